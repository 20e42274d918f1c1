"""CIFAR-10 and CIFAR-100, read by torchvision and held in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional

from m2mkd_fast.data.image_dataset import ImageDataset, TensorSplit
from m2mkd_fast.data.subset import check_num_classes, choose_images
from m2mkd_fast.errors import M2MKDError, UnknownNameError

# torchvision's class, mean and standard deviation of the training images.
_DATASETS = {
    "cifar10": ("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_GREY = (0.299, 0.587, 0.114)


def create_torchvision(
    name: str,
    *,
    image_size: int | None = None,
    in_chans: int | None = None,
    seed: int = 0,
    num_classes: int | None = None,
    images_per_class: int | None = None,
    root: str | Path | None = None,
    download: bool = False,
) -> ImageDataset:
    """torchvision's "cifar10" or "cifar100" from the folder `root`, downloaded there only with `download=True`.

    `image_size` (default 32) resizes bilinearly, `in_chans` is 3 (default) or 1 (luminance); `seed` draws which
    `images_per_class` are kept. Raises M2MKDError with the call to make when the files are not there.
    """
    if name not in _DATASETS:
        raise UnknownNameError("torchvision dataset", name, _DATASETS)
    class_name, mean, std = _DATASETS[name]
    call = f"create_dataset('torchvision:{name}', root={str(root or 'data')!r}, download=True)"
    if root is None:
        raise M2MKDError(f"dataset 'torchvision:{name}' needs root=, the folder that holds it; to download it: {call}")
    size, channels = image_size or 32, in_chans or 3
    if size < 1 or channels not in (1, 3):
        raise M2MKDError(f"image_size={size}, in_chans={channels}: a positive size, and 1 or 3 channels")
    from torchvision import datasets

    splits = {}
    for split in ("train", "test"):
        try:
            source = getattr(datasets, class_name)(str(Path(root).expanduser()), split == "train", download=download)
        except (RuntimeError, OSError) as error:
            remedy = "check the connection and the folder" if download else f"to download it: {call}"
            raise M2MKDError(f"dataset 'torchvision:{name}' is not in {root} ({error}); {remedy}") from error
        classes = check_num_classes(name, num_classes, len(source.classes))
        labels = torch.tensor(source.targets, dtype=torch.int64)
        limit = images_per_class if split == "train" else None
        kept = choose_images(name, labels, num_classes=classes, images_per_class=limit, seed=seed)
        pixels = torch.from_numpy(source.data).permute(0, 3, 1, 2)[kept].contiguous()
        splits[split] = _split(split, pixels, labels[kept], classes, size, channels, mean, std)
    return ImageDataset(f"torchvision:{name}", list(source.classes[:classes]), splits)


def _split(
    name: str,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    size: int,
    channels: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> TensorSplit:
    if size != pixels.shape[-1]:
        # PyTorch resizes uint8 directly, so no copy four times as large is needed.
        pixels = functional.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    if channels == 1:
        grey = sum(weight * pixels[:, i : i + 1] for i, weight in enumerate(_GREY))
        pixels = grey.round().to(torch.uint8)
        mean, std = (sum(w * m for w, m in zip(_GREY, mean, strict=True)),), (sum(std) / 3,)
    return TensorSplit(name, pixels, labels, classes, mean, std)
