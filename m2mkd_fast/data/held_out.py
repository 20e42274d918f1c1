"""Parts of any dataset: a validation split held out of the training images, and tasks of few classes and images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from m2mkd_fast.data.image_dataset import ImageDataset, Split
from m2mkd_fast.data.seeds import derived_generator
from m2mkd_fast.errors import M2MKDError, UnknownNameError

_FEW_SHOT = ("ways", "shots", "queries")


def hold_out_validation(dataset: ImageDataset, share: float, seed: int) -> ImageDataset:
    """The dataset with a split "val" of `share` of the training images of every class, which "train" then lacks.

    The images of a class are drawn from `seed`, for each class on its own; at least one stays in either split.
    """
    if not 0 < share < 1:
        raise M2MKDError(f"validation={share}: the share of the training images held out, between 0 and 1")
    train = dataset.splits["train"]
    held = torch.zeros(len(train), dtype=torch.bool)
    for label, images in _images_of_classes(train).items():
        if len(images) < 2:
            raise M2MKDError(
                f"validation={share}: class {dataset.class_names[label]!r} has {len(images)} training image; at least "
                "2 are needed to hold one out"
            )
        count = min(max(round(share * len(images)), 1), len(images) - 1)
        order = torch.randperm(len(images), generator=derived_generator(seed, "validation", label))
        held[images[order[:count]]] = True
    kept, out = torch.nonzero(~held).flatten(), torch.nonzero(held).flatten()
    parts = {
        "train": train.subset(kept, "train", train.labels[kept], train.num_classes),
        "val": train.subset(out, "val", train.labels[out], train.num_classes),
    }
    others = {name: split for name, split in dataset.splits.items() if name != "train"}
    facts = {**dataset.facts, "validation": share}
    return ImageDataset(dataset.name, dataset.class_names, parts | others, facts)


def choose_few_shot(dataset: ImageDataset, settings: Mapping[str, int], seed: int) -> ImageDataset:
    """A task of `ways` classes with `shots` training images and `queries` (default 3 `shots`) test images of each.

    Classes and images are drawn from `seed`; the classes are numbered anew in the order they had. Training images come
    from the split "train" and test images from "test", so none is in both. In the published trainer for CIFAR-100 the
    first `shots` test images of each class are its training images, and with seed 0 the two draw different classes.
    """
    for name in settings:
        if name not in _FEW_SHOT:
            raise UnknownNameError("option of few_shot:", name, _FEW_SHOT)
    missing = [name for name in ("ways", "shots") if name not in settings]
    if missing:
        raise M2MKDError(f"few_shot={dict(settings)} lacks {' and '.join(missing)}; write {{ways: 8, shots: 5}}")
    ways, shots = settings["ways"], settings["shots"]
    queries = settings.get("queries", 3 * shots)
    if not 2 <= ways <= dataset.num_classes:
        raise M2MKDError(f"few_shot: ways={ways}; choose from 2 to {dataset.num_classes} classes")
    if min(shots, queries) < 1:
        raise M2MKDError(f"few_shot: shots={shots}, queries={queries}; each must be at least 1")
    order = torch.randperm(dataset.num_classes, generator=derived_generator(seed, "few-shot classes"))
    classes = order[:ways].sort().values.tolist()
    splits = {}
    for name, count in (("train", shots), ("test", queries)):
        split = dataset.splits[name]
        images = _images_of_classes(split)
        chosen: list[Tensor] = []
        for label in classes:
            available = images.get(label, torch.empty(0, dtype=torch.int64))
            if len(available) < count:
                raise M2MKDError(
                    f"few_shot: class {dataset.class_names[label]!r} has {len(available)} images in split {name!r}, "
                    f"fewer than {count}"
                )
            draw = torch.randperm(len(available), generator=derived_generator(seed, "few-shot", name, label))
            chosen.append(available[draw[:count]])
        labels = torch.arange(ways).repeat_interleave(count)
        splits[name] = split.subset(torch.cat(chosen), name, labels, ways)
    facts = {**dataset.facts, "few_shot": {"ways": ways, "shots": shots, "queries": queries}}
    return ImageDataset(dataset.name, [dataset.class_names[label] for label in classes], splits, facts)


def _images_of_classes(split: Split) -> dict[int, Tensor]:
    """Indices int64 of the images of every class that has some, ascending."""
    order = torch.sort(split.labels, stable=True).indices
    counts = torch.bincount(split.labels, minlength=split.num_classes).tolist()
    return {label: images for label, images in enumerate(order.split(counts)) if len(images)}
