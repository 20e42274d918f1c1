"""What every dataset of this package looks like: named splits of labelled images, and facts to write into a run."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from m2mkd_fast.errors import M2MKDError

if TYPE_CHECKING:
    from PIL import Image


class Split(ABC):
    """N labelled images of one shape.

    Attributes: `labels` int64 [N], class ids in the numbering of the whole dataset; `num_classes` of the whole dataset;
    `image_shape` (C, H, W); `mean` and `std`, one value per channel, for pixels in [0, 1].
    """

    def __init__(
        self,
        name: str,
        labels: Tensor,
        num_classes: int,
        image_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        channels = image_shape[0]
        if len(mean) != channels or len(std) != channels:
            raise M2MKDError(
                f"split {name!r} has {channels} channel(s) but {len(mean)} mean(s) and {len(std)} standard "
                "deviation(s); give one of each per channel"
            )
        self.name, self.labels, self.num_classes, self.image_shape = name, labels, num_classes, image_shape
        self.mean, self.std = tuple(mean), tuple(std)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def class_mask(self) -> Tensor:
        """bool [num_classes]: the classes of which this split has at least one image."""
        return torch.bincount(self.labels, minlength=self.num_classes) > 0

    @property
    def unreadable(self) -> int:
        """Number of images that could not be decoded so far."""
        return 0

    def normalise(self, pixels: Tensor) -> Tensor:
        """(x - mean) / std of pixels [B, C, H, W], either uint8 in [0, 255] or floating point in [0, 1]."""
        values = pixels.to(torch.float32) / 255 if pixels.dtype == torch.uint8 else pixels
        mean, std = (torch.tensor(v, dtype=values.dtype).view(-1, 1, 1) for v in (self.mean, self.std))
        return (values - mean) / std

    @abstractmethod
    def load(self, indices: Tensor, *, replace_unreadable: bool = False) -> tuple[Tensor, Tensor]:
        """Normalised images float32 [B, C, H, W] and labels int64 [B] of `indices`.

        An image that cannot be decoded is left out, or with `replace_unreadable` replaced by the next readable one, so
        that a training batch keeps its size.
        """

    @abstractmethod
    def picture(self, index: int) -> tuple[Image.Image, int]:
        """The image `index` before any resizing, with its label, or if it cannot be decoded the next one that can."""

    @abstractmethod
    def subset(self, indices: Tensor, name: str, labels: Tensor, num_classes: int) -> Split:
        """The images of `indices` as a split of their own, with `labels` of a task of `num_classes` classes."""

    @abstractmethod
    def content_hash(self) -> str:
        """Hexadecimal digest that changes when an image or a label changes."""


class TensorSplit(Split):
    """A split held in memory: `pixels` [N, C, H, W], uint8 in [0, 255] or float32 in [0, 1]."""

    def __init__(
        self, name: str, pixels: Tensor, labels: Tensor, num_classes: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__(name, labels, num_classes, tuple(pixels.shape[1:]), mean, std)
        self.pixels = pixels

    def load(self, indices: Tensor, *, replace_unreadable: bool = False) -> tuple[Tensor, Tensor]:
        return self.normalise(self.pixels[indices]), self.labels[indices]

    def picture(self, index: int) -> tuple[Image.Image, int]:
        from PIL import Image

        pixels = self.pixels[index]
        if pixels.dtype != torch.uint8:
            pixels = (pixels * 255).round().to(torch.uint8)
        array = pixels.squeeze(0).numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
        return Image.fromarray(array), int(self.labels[index])

    def subset(self, indices: Tensor, name: str, labels: Tensor, num_classes: int) -> TensorSplit:
        return TensorSplit(name, self.pixels[indices], labels, num_classes, self.mean, self.std)

    def content_hash(self) -> str:
        digest = hashlib.sha256(f"{self.pixels.dtype} {tuple(self.pixels.shape)}".encode())
        digest.update(self.pixels.contiguous().numpy())
        digest.update(self.labels.contiguous().numpy())
        return digest.hexdigest()


@dataclass
class ImageDataset:
    """Named splits ("train", "test" and, where there are such, "val" and "ood") of one classification task.

    `facts` are JSON-able things a source knows about itself beyond its splits, such as fonts or a folder's layout.
    """

    name: str
    class_names: list[str]
    splits: dict[str, Split]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image that `train_batches` and `eval_batches` give."""
        return self.splits["train"].image_shape

    def describe(self) -> dict[str, Any]:
        """JSON-able facts for a run's records: sizes, normalisation, unreadable images and a hash of the content."""
        hashes = {name: split.content_hash() for name, split in self.splits.items()}
        combined = hashlib.sha256(repr((sorted(hashes.items()), self.class_names)).encode()).hexdigest()
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
            "image_shape": list(self.image_shape),
            "mean": list(self.splits["train"].mean),
            "std": list(self.splits["train"].std),
            "splits": {
                name: {"images": len(split), "unreadable": split.unreadable, "content_hash": hashes[name]}
                for name, split in self.splits.items()
            },
            "content_hash": combined,
            **self.facts,
        }
