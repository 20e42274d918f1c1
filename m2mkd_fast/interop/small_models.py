"""timm's architectures made small: few pixels, few blocks, and values in which a mistake shows."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError

CLASSES = 10
# Architectures with more parameters are built with fewer blocks, so that one survey fits in a few GiB.
PARAMETERS_AT_MOST = 100_000_000

# Sides of images from the least: multiples of 32 and of 64, and what patches of 14 and 24 pixels, merged by two or
# three, or windows of 7 need.
_SIDES = (64, 84, 96, 112, 126, 128, 144, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)
# What a model raises about images that it cannot take, in the constructor or on the way.
_REFUSALS = (ArithmeticError, AssertionError, IndexError, RuntimeError, TypeError, ValueError)
# Words for size in architectures' names, least first; names without any come last.
_SIZES = ("test", "atto", "femto", "pico", "nano", "xxs", "xx", "xxtiny", "xs", "mini", "tiny", "ti", "small", "s")
_FEWER_BLOCKS = (
    {"depth": 4},
    {"depth": 2},
    *({name: (2,) * stages} for name in ("depths", "layers", "num_blocks") for stages in (4, 3, 5)),
)


@dataclass(frozen=True)
class SmallModel:
    """A model with random values, in training mode, the shape of images it takes, and how it was shortened."""

    model: nn.Module
    image_shape: tuple[int, int, int]
    shortened: str


def smallest(architectures: list[str]) -> str:
    """The smallest of a family, judged by names: by their word for size, then by their numbers."""

    def size(name: str) -> tuple:
        words = set(name.split("_")) | {word for word in re.split(r"[_\d]+", name) if len(word) > 1}
        rank = min((_SIZES.index(word) for word in words & set(_SIZES)), default=len(_SIZES))
        return rank, [int(number) for number in re.findall(r"\d+", name)], name

    return min(architectures, key=size)


def small_model(architecture: str, seed: int = 0) -> SmallModel:
    """Build an architecture with 10 classes, on the smallest square images that it takes.

    Above `PARAMETERS_AT_MOST` parameters it is built with fewer blocks, if it takes a depth. Values are drawn from
    `seed`: what timm sets to a constant (layer scales, gains, BatchNorm's statistics) is spread around that constant,
    for a branch that is multiplied by 0 or by 1 hides what it does; dropout is switched on for the training mode.

    Raises:
        M2MKDError: no size of images was found that the model takes.
    """
    torch.manual_seed(seed)
    options = _fewer_blocks(architecture)
    reasons = {}
    model, sized = None, True
    for side in _sides(architecture):
        image_shape = (_channels(architecture), side, side)
        try:
            if sized:
                try:
                    model = _build(architecture, options | {"img_size": side})
                except TypeError:  # no constructor takes it: one model serves every size
                    model, sized = _build(architecture, options), False
            _make_mistakes_show(model)
            outputs = _outputs(model, image_shape)
        except _REFUSALS as error:
            reasons[side] = f"{type(error).__name__}: {error}"
            continue
        if outputs.isfinite().all() and not torch.equal(outputs[0], outputs[1]):
            return SmallModel(model.train(), image_shape, ", ".join(f"{k}={v}" for k, v in options.items()))
        reasons[side] = "its outputs do not depend on the image, or are not finite"
    said = "; ".join(f"{side} px: {reason[:120]}" for side, reason in reasons.items())
    raise M2MKDError(f"no image size was found that {architecture} takes ({said})")


@torch.no_grad()
def _make_mistakes_show(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() > 0 and parameter.min() == parameter.max():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    if isinstance(getattr(model, "drop_rate", None), float):  # read by classifiers that call functional dropout
        model.drop_rate = 0.1


def _build(architecture: str, options: dict) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated names and settings of timm's own
        return timm.create_model(architecture, num_classes=CLASSES, **options)


def _outputs(model: nn.Module, image_shape: tuple[int, int, int]) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(2, *image_shape))


def _sides(architecture: str) -> list[int]:
    """Sides to try, in order: small ones up to the architecture's own, then its own."""
    own = max(get_pretrained_cfg(architecture).input_size[1:])
    return [side for side in _SIDES if side < own] + [own]


def _channels(architecture: str) -> int:
    return get_pretrained_cfg(architecture).input_size[0]


def _fewer_blocks(architecture: str) -> dict:
    """Arguments that bring the architecture under the limit, or as near to it as any that it takes."""
    best, options = _parameters(architecture, {}), {}
    for candidate in _FEWER_BLOCKS:
        if best <= PARAMETERS_AT_MOST:
            break
        try:
            parameters = _parameters(architecture, candidate)
        except _REFUSALS:
            continue
        if parameters < best:
            best, options = parameters, candidate
    return options


def _parameters(architecture: str, options: dict) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in _build(architecture, options).parameters())
