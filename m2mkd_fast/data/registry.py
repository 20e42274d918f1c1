"""Datasets by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from m2mkd_fast.data.held_out import choose_few_shot, hold_out_validation
from m2mkd_fast.data.image_dataset import ImageDataset
from m2mkd_fast.errors import M2MKDError, UnknownNameError

# Kind -> module and function; imported on use, since some need libraries that not everybody has.
_SOURCES = {
    "digits": ("m2mkd_fast.data.digits", "create_digits"),
    "glyphs": ("m2mkd_fast.data.glyphs", "create_glyphs"),
    "folder": ("m2mkd_fast.data.image_folder", "create_image_folder"),
    "imagenet": ("m2mkd_fast.data.imagenet", "create_imagenet"),
    "tiny-imagenet": ("m2mkd_fast.data.imagenet", "create_tiny_imagenet"),
    "cub": ("m2mkd_fast.data.cub", "create_cub"),
    "coco": ("m2mkd_fast.data.coco", "create_coco"),
    "webdataset": ("m2mkd_fast.data.webdataset_shards", "create_webdataset"),
    "huggingface": ("m2mkd_fast.data.huggingface_datasets", "create_huggingface"),
    "torchvision": ("m2mkd_fast.data.torchvision_datasets", "create_torchvision"),
}
_ARGUMENT = {
    "folder": "a folder, as in 'folder:data/pets'",
    "imagenet": "a folder, as in 'imagenet:data/imagenet'",
    "tiny-imagenet": "a folder, as in 'tiny-imagenet:data/tiny-imagenet-200'",
    "cub": "a folder, as in 'cub:data/CUB_200_2011'",
    "coco": "a folder, as in 'coco:data/coco'",
    "webdataset": "a folder or a pattern, as in 'webdataset:data/train-{000..127}.tar'",
    "huggingface": "a folder or a name, as in 'huggingface:ylecun/mnist'",
    "torchvision": "a name, as in 'torchvision:cifar10'",
}
_SPECS = (
    "digits",
    "glyphs",
    "folder:PATH",
    "imagenet:PATH",
    "tiny-imagenet:PATH",
    "cub:PATH",
    "coco:PATH",
    "webdataset:PATTERN",
    "huggingface:NAME_OR_PATH",
    "torchvision:cifar10",
    "torchvision:cifar100",
)


def list_datasets() -> list[str]:
    """What `create_dataset` accepts; PATH stands for a folder, PATTERN for shards, NAME for a dataset of the Hub."""
    return list(_SPECS)


def create_dataset(
    spec: str,
    *,
    image_size: int | None = None,
    in_chans: int | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    num_classes: int | None = None,
    images_per_class: int | None = None,
    validation: float = 0.0,
    few_shot: Mapping[str, int] | None = None,
    **options: Any,
) -> ImageDataset:
    """The dataset that `spec` names: one of `list_datasets()`.

    Args:
        spec: "digits", "glyphs", "folder:PATH", "imagenet:PATH", "webdataset:PATTERN", "torchvision:cifar10", ….
        image_size: side of the square images in pixels; each dataset has its own default.
        in_chans: channels of the images; each dataset has its own default.
        seed: draws what the dataset draws: the division of the digits, the renditions of the glyphs, the choice of
            `images_per_class`, of `validation` and of `few_shot`. It has nothing to do with the order of the batches.
        cache_dir: where a dataset that is costly to make (glyphs, the index of shards) keeps a copy.
        num_classes: keep the first so many classes.
        images_per_class: keep, or render, so many training images per class.
        validation: this share of the training images of each class becomes the split "val"; 0 for none.
        few_shot: {"ways": classes, "shots": training images of each, "queries": test images of each}; see
            `choose_few_shot`.
        options: what only some datasets take; see `create_glyphs`, `PictureOptions`, `create_imagenet`, `create_cub`,
            `create_coco`, `create_webdataset`, `create_huggingface`, `create_image_folder`, `create_torchvision`.

    Raises:
        UnknownNameError: for an unknown dataset or option, with near matches.
        M2MKDError: when the data is not there or not as expected; the message says what to do.
    """
    kind, separator, argument = spec.partition(":")
    if kind not in _SOURCES:
        remedy = f"For images in a folder write 'folder:{spec}'." if Path(spec).is_dir() else ""
        raise UnknownNameError("dataset", spec, _SPECS, remedy)
    if kind in _ARGUMENT and not argument:
        raise M2MKDError(f"dataset {spec!r} lacks {_ARGUMENT[kind]}")
    if kind not in _ARGUMENT and separator:
        raise M2MKDError(f"dataset {kind!r} takes nothing after a colon, got {spec!r}; options are keyword arguments")
    module, function = _SOURCES[kind]
    create = getattr(importlib.import_module(module), function)
    common = {
        "image_size": image_size,
        "in_chans": in_chans,
        "seed": seed,
        "num_classes": num_classes,
        "images_per_class": images_per_class,
    }
    dataset = _create(kind, create, [argument] if argument else [], common, cache_dir, options)
    if few_shot is not None:
        dataset = choose_few_shot(dataset, few_shot, seed)
    return hold_out_validation(dataset, validation, seed) if validation else dataset


def _create(
    kind: str,
    create: Any,
    arguments: list[Any],
    common: dict[str, Any],
    cache_dir: str | Path | None,
    options: dict[str, Any],
) -> ImageDataset:
    accepted = inspect.signature(create).parameters
    known = [name for name, option in accepted.items() if option.kind is option.KEYWORD_ONLY]
    shared: list[str] = []
    if "options" in accepted:
        from m2mkd_fast.data.picture_dataset import PictureOptions

        shared = [field.name for field in fields(PictureOptions)]
    own = sorted({*known, *shared} - common.keys() - {"cache_dir"})
    for name in options:
        if name not in own:
            raise UnknownNameError(f"option of dataset {kind!r}:", name, own, "" if own else "It takes none.")
    if shared:
        chosen = {name: options.pop(name) for name in shared if name in options}
        arguments, common = [*arguments, PictureOptions(**common, **chosen)], {}
    if "cache_dir" in accepted:
        common = {**common, "cache_dir": cache_dir}
    return create(*arguments, **common, **options)
