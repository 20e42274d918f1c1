"""Choosing the first classes, and a number of training images per class, from labelled images."""

from __future__ import annotations

import torch
from torch import Tensor

from m2mkd_fast.data.seeds import derived_generator
from m2mkd_fast.errors import M2MKDError


def check_num_classes(dataset: str, num_classes: int | None, available: int) -> int:
    """`num_classes`, or all `available` ones; an error when it is not between 2 and `available`."""
    if num_classes is None:
        return available
    if not 2 <= num_classes <= available:
        raise M2MKDError(f"num_classes={num_classes} for dataset {dataset!r}: choose from 2 to {available}")
    return num_classes


def choose_images(
    dataset: str, labels: Tensor, *, num_classes: int, images_per_class: int | None = None, seed: int = 0
) -> Tensor:
    """Ascending indices int64 of the images with label < `num_classes`, at most `images_per_class` of each class.

    Which images of a class are kept is drawn from `seed`, for each class on its own: a larger `images_per_class` keeps
    all that a smaller one kept, and other classes do not matter.
    """
    if images_per_class is None:
        return torch.nonzero(labels < num_classes).flatten()
    chosen = []
    for label in range(num_classes):
        of_class = torch.nonzero(labels == label).flatten()
        if not 1 <= images_per_class <= len(of_class):
            raise M2MKDError(
                f"images_per_class={images_per_class} for dataset {dataset!r}: class {label} has {len(of_class)} "
                f"training image(s); choose from 1 to {len(of_class)}"
            )
        order = torch.randperm(len(of_class), generator=derived_generator(seed, "images per class", label))
        chosen.append(of_class[order[:images_per_class]])
    return torch.cat(chosen).sort().values
