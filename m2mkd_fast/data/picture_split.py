"""A split whose images are decoded when asked for: from files, from shards, from tables."""

from __future__ import annotations

import hashlib
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m2mkd_fast.data.image_dataset import Split
from m2mkd_fast.data.string_table import StringTable
from m2mkd_fast.errors import M2MKDError


class UnreadableImageWarning(UserWarning):
    """An image that cannot be decoded; it is counted and skipped."""


class UnreadableImages:
    """Which of `total` images of a dataset proved unreadable, counted over all of its splits and worker processes."""

    def __init__(self, total: int, limit: int) -> None:
        self.limit = limit
        # Shared memory, so that what a worker process finds counts everywhere.
        self.flags = torch.zeros(total, dtype=torch.bool).share_memory_()

    def add(self, index: int, name: str, reason: Exception) -> None:
        """Count an image and warn, once; raise M2MKDError when there are more than `limit`."""
        if self.flags[index]:
            return
        self.flags[index] = True
        count = int(self.flags.sum())
        if count > self.limit:
            raise M2MKDError(
                f"cannot read image {name} ({reason}); with it {count} images are unreadable and "
                f"max_unreadable={self.limit}. Repair or remove them, or raise max_unreadable"
            )
        warnings.warn(
            f"cannot read image {name} ({reason}); skipped, {count} of at most {self.limit}",
            UnreadableImageWarning,
            stacklevel=2,
        )


class PictureSource(ABC):
    """N encoded images that can be reached in any order."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """The image as Pillow opens it, not yet decoded; any error means that it cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Where it is, for messages."""

    @abstractmethod
    def identities(self) -> Iterator[str]:
        """Each image's name and size in bytes: what the hash of the content counts of it without reading it."""

    @abstractmethod
    def subset(self, indices: Tensor) -> PictureSource:
        """The images of `indices`, in that order."""

    def box(self, index: int) -> tuple[int, int, int, int] | None:
        """(left, top, right, bottom) in pixels of the part that counts; None for the whole image."""
        return None


class ImageFiles(PictureSource):
    """Files, each an image."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.paths = StringTable(os.fspath(path) for path in paths)

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])

    def name(self, index: int) -> str:
        return self.paths[index]

    def identities(self) -> Iterator[str]:
        return (f"{os.path.basename(path)}/{os.stat(path).st_size}" for path in self.paths)

    def subset(self, indices: Tensor) -> ImageFiles:
        part = ImageFiles([])
        part.paths = self.paths.subset(indices)
        return part


class PictureSplit(Split):
    """N encoded images. An evaluated image is resized (bicubic) so that its shorter side is image size /
    `crop_fraction`, and its centre is cropped.

    `places` int64 [N] are the places of its images in `unreadable_images`.
    """

    def __init__(
        self,
        name: str,
        pictures: PictureSource,
        labels: Tensor,
        num_classes: int,
        image_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        crop_fraction: float,
        unreadable_images: UnreadableImages,
        places: Tensor,
    ) -> None:
        super().__init__(name, labels, num_classes, image_shape, mean, std)
        self.pictures, self.crop_fraction = pictures, crop_fraction
        self._unreadable, self._places = unreadable_images, places

    @property
    def unreadable(self) -> int:
        return int(self._unreadable.flags[self._places].sum())

    def check(self, *, decode: bool) -> None:
        """Open every image, and with `decode` read all of its pixels; count and warn about those that fail."""
        for index in range(len(self)):
            self._open(index, decode=decode)

    def _open(self, index: int, *, decode: bool = True) -> Image.Image | None:
        place = int(self._places[index])
        if self._unreadable.flags[place]:
            return None
        try:
            with self.pictures.open(index) as image:
                if not decode:
                    return image
                box = self.pictures.box(index)
                part = image if box is None else image.crop(box)
                return part.convert("L" if self.image_shape[0] == 1 else "RGB")
        # Pillow raises nearly anything for a damaged file, SyntaxError and struct.error among them.
        except Exception as error:
            self._unreadable.add(place, self.pictures.name(index), error)
            return None

    def picture(self, index: int) -> tuple[Image.Image, int]:
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            image = self._open(candidate)
            if image is not None:
                return image, int(self.labels[candidate])
        raise M2MKDError(
            f"split {self.name!r}: none of its {len(self)} images can be read, from {self.pictures.name(0)} on"
        )

    def _fit(self, image: Image.Image) -> Tensor:
        size = self.image_shape[1]
        factor = size / self.crop_fraction / min(image.size)
        width, height = (max(size, round(side * factor)) for side in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        pixels = torch.from_numpy(np.array(image.crop((left, top, left + size, top + size))))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)

    def load(self, indices: Tensor, *, replace_unreadable: bool = False) -> tuple[Tensor, Tensor]:
        pixels, labels = [], []
        for index in indices.tolist():
            if replace_unreadable:
                image, label = self.picture(index)
            else:
                image, label = self._open(index), int(self.labels[index])
            if image is not None:
                pixels.append(self._fit(image))
                labels.append(label)
        stacked = torch.stack(pixels) if pixels else torch.empty(0, *self.image_shape, dtype=torch.uint8)
        return self.normalise(stacked), torch.tensor(labels, dtype=torch.int64)

    def content_hash(self) -> str:
        """Digest of every image's name, class and size in bytes; the pixels themselves are not read."""
        digest = hashlib.sha256()
        for label, identity in zip(self.labels.tolist(), self.pictures.identities(), strict=True):
            digest.update(f"{label}/{identity}\n".encode())
        return digest.hexdigest()

    def subset(self, indices: Tensor, name: str, labels: Tensor, num_classes: int) -> PictureSplit:
        return PictureSplit(
            name,
            self.pictures.subset(indices),
            labels,
            num_classes,
            self.image_shape,
            self.mean,
            self.std,
            crop_fraction=self.crop_fraction,
            unreadable_images=self._unreadable,
            places=self._places[indices],
        )
