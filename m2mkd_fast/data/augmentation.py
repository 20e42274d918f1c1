"""Random changes of training images: vectorised presets on tensors, timm's transforms on single pictures, recipes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from m2mkd_fast.errors import M2MKDError, UnknownNameError

if TYPE_CHECKING:
    from PIL import Image


class Rows(NamedTuple):
    """Which of a batch's `size` images there are: presets draw for all of them, so that a part of a batch changes as it
    does in the whole one."""

    size: int
    rows: Tensor | slice = slice(None)


@dataclass(frozen=True)
class Unchanged:
    """The preset "none": images as they are."""

    def __call__(self, images: Tensor, generator: torch.Generator, batch: Rows | None = None) -> Tensor:
        return images


@dataclass(frozen=True)
class Affine:
    """The preset "affine": each image rotated, scaled and shifted at random, bilinear, borders repeated.

    `rotation` in radians, `scale` relative, `shift` in units of half the image (as `affine_grid` counts); each is drawn
    uniformly from plus or minus that much.
    """

    rotation: float = 0.25
    scale: float = 0.15
    shift: float = 0.15

    def __call__(self, images: Tensor, generator: torch.Generator, batch: Rows | None = None) -> Tensor:
        size, rows = batch or Rows(len(images))
        draws = torch.rand(size, 4, generator=generator)[rows] * 2 - 1
        angle, scale = draws[:, 0] * self.rotation, 1 + draws[:, 1] * self.scale
        shift = draws[:, 2:] * self.shift
        cosine, sine = scale * angle.cos(), scale * angle.sin()
        matrix = torch.stack([cosine, -sine, shift[:, 0], sine, cosine, shift[:, 1]], dim=1).view(-1, 2, 3)
        grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
        return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class CropFlip:
    """The preset "crop_flip": borders repeated by `padding` of the image's side, a random crop of the old size, and a
    left-right flip with probability `flip`."""

    padding: float = 0.125
    flip: float = 0.5

    def __call__(self, images: Tensor, generator: torch.Generator, batch: Rows | None = None) -> Tensor:
        count, _, height, width = images.shape
        size, own = batch or Rows(count)
        rows = self._positions(size, height, generator)[own]
        columns = self._positions(size, width, generator)[own]
        flipped = (torch.rand(size, 1, generator=generator) < self.flip)[own]
        columns = torch.where(flipped, columns.flip(1), columns)
        # An index beyond the border repeats the border's pixel, so no padded copy is needed.
        picked = images[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return picked.permute(0, 3, 1, 2).contiguous()

    def _positions(self, count: int, side: int, generator: torch.Generator) -> Tensor:
        margin = round(self.padding * side)
        offset = torch.randint(-margin, margin + 1, (count, 1), generator=generator)
        return (offset + torch.arange(side)).clamp(0, side - 1)


class TimmTransform:
    """The preset "timm": `timm.data.create_transform(is_training=True, ...)` for one picture at a time.

    Options are those of `create_transform`, such as `auto_augment="rand-m9-mstd0.5-inc1"`, `re_prob`, `color_jitter`,
    `hflip`, `scale`, `ratio`, `interpolation`. It draws from the global random states: run it in `seeded_globals`.
    """

    def __init__(self, **options: Any) -> None:
        fixed = {"input_size", "is_training", "mean", "std", "use_prefetcher", "separate"} & options.keys()
        if fixed:
            raise M2MKDError(f"augmentation 'timm': {', '.join(sorted(fixed))} come(s) from the dataset; leave it out")
        self.options = options

    def bind(
        self, image_shape: tuple[int, int, int], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> Callable[[Image.Image], Tensor]:
        """The transform from a picture to a normalised image [C, H, W]."""
        if image_shape[0] != 3:
            raise M2MKDError(
                f"augmentation 'timm' works on 3 channels and the dataset has {image_shape[0]}; create the dataset "
                "with in_chans=3, or use 'affine', 'crop_flip' or 'none'"
            )
        from timm.data import create_transform

        try:
            transform = create_transform(image_shape, is_training=True, mean=mean, std=std, **self.options)
        except (TypeError, AssertionError, ValueError) as error:
            raise M2MKDError(
                f"augmentation 'timm' with {self.options}: timm.data.create_transform says {error}"
            ) from error
        for step in transform.transforms:
            for operation in [*getattr(step, "ops", []), *itertools.chain(*getattr(step, "policy", []))]:
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = _posterize
        return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's operation, which also asks for 0 bits: black, and since Pillow 13 an error in the midst of a training."""
    from PIL import ImageOps

    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else image.point(lambda _: 0)


PRESETS: dict[str, type] = {"none": Unchanged, "affine": Affine, "crop_flip": CropFlip, "timm": TimmTransform}

# Published recipes: options of timm's transforms, each of which can be given another value.
RECIPES: dict[str, dict[str, Any]] = {
    # H. Touvron et al., Training data-efficient image transformers, arXiv 2012.12877, table 9. Deep Incubation and
    # m2mKD train every phase with it (the defaults of their main.py), and NAC on ImageNet and on the 64 pixels of
    # Tiny-ImageNet (aa, reprob, train_interpolation of their configurations).
    "deit": {
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "color_jitter": 0.4,  # as published; timm jitters no colours where RandAugment does
        "re_prob": 0.25,
        "re_mode": "pixel",
        "re_count": 1,
        "interpolation": "bicubic",
    },
    # H. Touvron et al., DeiT III, arXiv 2204.07118, table 1: one of grey, solarised and blurred, then colour jitter; no
    # erasing. With the random resized crop of its ImageNet-1k recipe; the simple crop for ImageNet-21k timm has not.
    "deit3": {"auto_augment": "3a", "color_jitter": 0.3, "interpolation": "bicubic"},
    # C. Szegedy et al., arXiv 1409.4842, section 6, as ResNets are trained: a crop of 8 to 100 % of the area, flipped.
    "imagenet": {"color_jitter": None, "interpolation": "bilinear"},
}
Augmentation = Unchanged | Affine | CropFlip | TimmTransform


def create_augmentation(spec: str | Mapping[str, Any]) -> Augmentation:
    """A preset by name ("affine") or with options ({"name": "affine", "rotation": 0.1}).

    "none", "affine" and "crop_flip" work on tensors of any number of channels; "timm" takes the options of
    `timm.data.create_transform`, and "deit", "deit3" and "imagenet" are published recipes made of them, any of whose
    options can be given another value ({"name": "deit", "re_prob": 0.0}).

    Raises UnknownNameError for an unknown preset or option.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name in RECIPES:
        return TimmTransform(**{**RECIPES[name], **options})
    if name not in PRESETS:
        raise UnknownNameError("augmentation", str(name), [*PRESETS, *RECIPES])
    preset = PRESETS[name]
    if preset is not TimmTransform:
        known = [option.name for option in fields(preset)]
        for option, value in options.items():
            if option not in known:
                raise UnknownNameError(f"option of augmentation {name!r}:", option, known)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise M2MKDError(f"augmentation {name!r}: {option}={value!r} must be a number from 0 to 1")
    return preset(**options)
