"""Datasets by name."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from m2mkd_fast.data.image_dataset import ImageDataset
from m2mkd_fast.errors import M2MKDError, UnknownNameError

# Kind -> module and function; imported on use, since some need libraries that not everybody has.
_SOURCES = {
    "digits": ("m2mkd_fast.data.digits", "create_digits"),
    "glyphs": ("m2mkd_fast.data.glyphs", "create_glyphs"),
    "folder": ("m2mkd_fast.data.image_folder", "create_image_folder"),
    "torchvision": ("m2mkd_fast.data.torchvision_datasets", "create_torchvision"),
}
_ARGUMENT = {
    "folder": "a folder, as in 'folder:data/tiny-imagenet-200'",
    "torchvision": "a name, as in 'torchvision:cifar10'",
}
_SPECS = ("digits", "glyphs", "folder:PATH", "torchvision:cifar10", "torchvision:cifar100")


def list_datasets() -> list[str]:
    """What `create_dataset` accepts; PATH stands for a folder."""
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
    **options: Any,
) -> ImageDataset:
    """The dataset that `spec` names: one of `list_datasets()`.

    Args:
        spec: "digits", "glyphs", "folder:PATH", "torchvision:cifar10" or "torchvision:cifar100".
        image_size: side of the square images in pixels; each dataset has its own default.
        in_chans: channels of the images; each dataset has its own default.
        seed: draws what the dataset draws: the division of the digits, the renditions of the glyphs, the choice of
            `images_per_class`. It has nothing to do with the order of the batches.
        cache_dir: where a dataset that is costly to make (glyphs) keeps a copy; nothing is kept without it.
        num_classes: keep the first so many classes.
        images_per_class: keep, or render, so many training images per class.
        options: what only some datasets take; see `create_glyphs`, `create_image_folder`, `create_torchvision`.

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
    accepted = inspect.signature(create).parameters
    common = {
        "image_size": image_size,
        "in_chans": in_chans,
        "seed": seed,
        "num_classes": num_classes,
        "images_per_class": images_per_class,
    }
    if "cache_dir" in accepted:
        common["cache_dir"] = cache_dir
    known = [name for name, option in accepted.items() if option.kind is option.KEYWORD_ONLY and name not in common]
    for name in options:
        if name not in known:
            raise UnknownNameError(f"option of dataset {kind!r}:", name, known, "" if known else "It takes none.")
    return create(*([argument] if argument else []), **common, **options)
