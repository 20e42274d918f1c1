"""scikit-learn's 1797 real handwritten digits, 8x8 pixels, which come with the library itself."""

from __future__ import annotations

import torch
from torch.nn import functional

from m2mkd_fast.data.image_dataset import ImageDataset, TensorSplit
from m2mkd_fast.data.subset import check_num_classes, choose_images
from m2mkd_fast.errors import M2MKDError

TEST_IMAGES = 500
MEAN, STD = 0.3, 0.36


def create_digits(
    *,
    image_size: int | None = None,
    in_chans: int | None = None,
    seed: int = 0,
    num_classes: int | None = None,
    images_per_class: int | None = None,
) -> ImageDataset:
    """Handwritten digits, resized bilinearly to `image_size` (default 16), 1297 for training and 500 for testing.

    `seed` draws the one permutation that divides them. `in_chans` (default 1) repeats the grey channel.
    `num_classes` keeps the digits below it, `images_per_class` limits the training images.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test part).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise M2MKDError(f"the digits dataset comes with scikit-learn: pip install scikit-learn ({error})") from error
    size, channels = image_size or 16, in_chans or 1
    if size < 1 or channels < 1:
        raise M2MKDError(f"image_size={image_size}, in_chans={in_chans} for dataset 'digits': both must be positive")
    classes = check_num_classes("digits", num_classes, 10)
    source = load_digits()
    pixels = torch.from_numpy(source.images).to(torch.float32)[:, None] / 16
    pixels = functional.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    pixels = pixels.repeat(1, channels, 1, 1)
    labels = torch.from_numpy(source.target).to(torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    splits = {}
    for name, part in (("train", order[:-TEST_IMAGES]), ("test", order[-TEST_IMAGES:])):
        limit = images_per_class if name == "train" else None
        part = part[choose_images("digits", labels[part], num_classes=classes, images_per_class=limit, seed=seed)]
        splits[name] = TensorSplit(name, pixels[part], labels[part], classes, (MEAN,) * channels, (STD,) * channels)
    return ImageDataset("digits", [str(digit) for digit in range(classes)], splits)
