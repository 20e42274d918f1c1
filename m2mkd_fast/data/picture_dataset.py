"""What every dataset of encoded images shares: its options, and how its splits are made of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2mkd_fast.data.image_dataset import ImageDataset
from m2mkd_fast.data.picture_split import PictureSource, PictureSplit, UnreadableImages
from m2mkd_fast.data.subset import check_num_classes, choose_images
from m2mkd_fast.errors import M2MKDError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.449,), (0.226,)


@dataclass(frozen=True)
class PictureOptions:
    """Options of every dataset of encoded images.

    Attributes:
        image_size: side of the square images; default 224, for Tiny-ImageNet 64.
        in_chans: 3 (default, RGB) or 1 (grey).
        seed: draws which `images_per_class` are kept.
        num_classes: keep the first so many classes.
        images_per_class: keep so many training images of each class.
        mean, std: one value per channel for pixels in [0, 1]; default ImageNet's.
        crop_fraction: share of the resized image's shorter side that is kept; default 0.875, for Tiny-ImageNet 1.
        max_unreadable: so many images that cannot be decoded are skipped, each with a warning; one more is an error.
        check: how to look for them at once: "header" opens every image, "decode" reads its pixels, "none" waits until
            an image is used; by default "header" for folders and "none" for the large published datasets.
    """

    image_size: int | None = None
    in_chans: int | None = None
    seed: int = 0
    num_classes: int | None = None
    images_per_class: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    crop_fraction: float | None = None
    max_unreadable: int = 10
    check: str | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise M2MKDError(f"image_size={self.image_size}: it must be positive")
        if self.in_chans not in (None, 1, 3):
            raise M2MKDError(f"in_chans={self.in_chans}: images have 3 channels (RGB) or 1 (grey)")
        if self.crop_fraction is not None and not 0 < self.crop_fraction <= 1:
            raise M2MKDError(f"crop_fraction={self.crop_fraction}: more than 0, at most 1")
        if self.max_unreadable < 0:
            raise M2MKDError(f"max_unreadable={self.max_unreadable}: 0 or more")
        if self.check not in (None, "header", "decode", "none"):
            raise M2MKDError(f"check={self.check!r}: one of 'header', 'decode', 'none'")


def make_picture_dataset(
    name: str,
    class_names: Sequence[str],
    pictures: Mapping[str, tuple[PictureSource, Tensor]],
    options: PictureOptions,
    *,
    image_size: int = 224,
    crop_fraction: float = 0.875,
    check: str = "none",
    facts: Mapping[str, Any] | None = None,
) -> ImageDataset:
    """A dataset of each split's images and labels int64 [N]; the keywords are this dataset's defaults."""
    names = list(class_names)[: check_num_classes(name, options.num_classes, len(class_names))]
    size, channels = options.image_size or image_size, options.in_chans or 3
    fraction, look = options.crop_fraction or crop_fraction, options.check or check
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else (GREY_MEAN, GREY_STD)
    kept = {}
    for split, (source, labels) in pictures.items():
        limit = options.images_per_class if split == "train" else None
        chosen = choose_images(name, labels, num_classes=len(names), images_per_class=limit, seed=options.seed)
        if not len(chosen):
            raise M2MKDError(f"split {split!r} has no image of the {len(names)} classes kept; raise num_classes")
        whole = len(chosen) == len(labels)
        kept[split] = (source, labels) if whole else (source.subset(chosen), labels[chosen])
    unreadable = UnreadableImages(sum(len(labels) for _, labels in kept.values()), options.max_unreadable)
    splits, first = {}, 0
    for split, (source, labels) in kept.items():
        splits[split] = PictureSplit(
            split,
            source,
            labels,
            len(names),
            (channels, size, size),
            mean if options.mean is None else options.mean,
            std if options.std is None else options.std,
            crop_fraction=fraction,
            unreadable_images=unreadable,
            places=torch.arange(first, first + len(labels)),
        )
        first += len(labels)
        if look != "none":
            splits[split].check(decode=look == "decode")
    return ImageDataset(name, names, splits, {**(facts or {}), "crop_fraction": fraction})


def require_folder(folder: Path, what: str, layout: str) -> None:
    """Raise M2MKDError, with near names, where `folder` is none."""
    if folder.is_dir():
        return
    if folder.exists():
        raise M2MKDError(f"{what} {folder} is a file; {layout} in a folder (unpack an archive first)")
    parent = folder.absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    here = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
    near = difflib.get_close_matches(folder.name, here, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(str(parent / name) for name in near)}?" if near else f"{parent} exists."
    raise M2MKDError(f"{what} {folder} does not exist; {layout} in it; {hint}")


def require_file(path: Path, layout: str) -> Path:
    """`path`, or an M2MKDError that says what lies beside where it should be."""
    if path.is_file():
        return path
    folder = path.parent
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    raise M2MKDError(f"{path} does not exist; {layout}; {folder} has: {found or 'nothing'}")
