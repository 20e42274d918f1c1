"""A split whose images are files, decoded when asked for."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m2mkd_fast.data.image_dataset import Split
from m2mkd_fast.errors import M2MKDError


class UnreadableImageWarning(UserWarning):
    """An image file that cannot be decoded; it is counted and skipped."""


class UnreadableImages:
    """Which of `total` files of a dataset proved unreadable, counted over all of its splits and worker processes."""

    def __init__(self, total: int, limit: int) -> None:
        self.limit = limit
        # Shared memory, so that what a worker process finds counts everywhere.
        self.flags = torch.zeros(total, dtype=torch.bool).share_memory_()

    def add(self, index: int, path: Path, reason: Exception) -> None:
        """Count a file and warn, once; raise M2MKDError when there are more than `limit`."""
        if self.flags[index]:
            return
        self.flags[index] = True
        count = int(self.flags.sum())
        if count > self.limit:
            raise M2MKDError(
                f"cannot read image {path} ({reason}); with it {count} images are unreadable and "
                f"max_unreadable={self.limit}. Repair or remove them, or raise max_unreadable"
            )
        warnings.warn(
            f"cannot read image {path} ({reason}); skipped, {count} of at most {self.limit}",
            UnreadableImageWarning,
            stacklevel=2,
        )


class FileSplit(Split):
    """N image files. An evaluated image is resized (bicubic) so that its shorter side is image size / `crop_fraction`,
    and its centre is cropped.

    `offset` is the place of this split's first file in `unreadable_images`.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        labels: Tensor,
        num_classes: int,
        image_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        crop_fraction: float,
        unreadable_images: UnreadableImages,
        offset: int,
    ) -> None:
        super().__init__(name, labels, num_classes, image_shape, mean, std)
        self.paths, self.crop_fraction = list(paths), crop_fraction
        self._unreadable, self._offset = unreadable_images, offset

    @property
    def unreadable(self) -> int:
        return int(self._unreadable.flags[self._offset : self._offset + len(self)].sum())

    def check(self, *, decode: bool) -> None:
        """Open every file, and with `decode` read all of its pixels; count and warn about those that fail."""
        for index in range(len(self)):
            self._open(index, decode=decode)

    def _open(self, index: int, *, decode: bool = True) -> Image.Image | None:
        if self._unreadable.flags[self._offset + index]:
            return None
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return image.convert("L" if self.image_shape[0] == 1 else "RGB") if decode else image
        # Pillow raises nearly anything for a damaged file, SyntaxError and struct.error among them.
        except Exception as error:
            self._unreadable.add(self._offset + index, path, error)
            return None

    def picture(self, index: int) -> tuple[Image.Image, int]:
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            image = self._open(candidate)
            if image is not None:
                return image, int(self.labels[candidate])
        raise M2MKDError(f"split {self.name!r}: none of its {len(self)} images can be read, from {self.paths[0]} on")

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
        """Digest of every file's name, class and size in bytes; the pixels themselves are not read."""
        digest = hashlib.sha256()
        for path, label in zip(self.paths, self.labels.tolist(), strict=True):
            digest.update(f"{label}/{path.name}/{path.stat().st_size}\n".encode())
        return digest.hexdigest()
