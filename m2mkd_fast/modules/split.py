"""Take a model apart into a chain of modules that computes the same, bit for bit."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.modules.chain import ModuleChain

Parts = int | str | Sequence[int]


def split(model: nn.Module, parts: Parts, image_shape: tuple[int, int, int] | None = None) -> ModuleChain:
    """Cut a model between units into a chain of modules that share the model's parameters.

    `chain(x)` equals `model(x)` bit for bit; `verify_split` proves it on given images. The first module also owns what
    comes before the blocks (patch embedding, stem, tokens), the last one what comes after (norm, pooling, classifier).

    timm's VisionTransformer and its subclasses that keep its forward pass (ViT, DeiT, V-MoE) are cut into
    `TransformerStage`, whose state names are the published ones; every other model (timm's, torchvision's, one's own)
    along the graph of its forward pass into `GraphStage`, whose state names are the model's own. A unit is a block of
    the former; of the latter a block, or several between which more than one tensor passes (`find_spine` says which).
    Such a split proves itself: for one random image in eval mode the chain gives what the model gives. That costs two
    forward passes of one image, beside the trace without values; on the meta device there is nothing to compare.
    Nothing of the model changes: neither mode nor buffers nor the state of torch's generators.

    Args:
        model: the bare model, neither compiled nor in a parallel wrapper.
        parts: how to cut the model's units.
            `4`: four modules of as equal a number of units as possible, earlier ones larger.
            `[3, 3, 2, 4]` or `"3,3,2,4"`: units in each module.
            `"balanced:4"`: four modules with as equal a number of parameters as possible.
        image_shape: channels, height and width of an image; None takes what the model says.

    Raises:
        M2MKDError: parts that do not fit the units, with what passes between blocks that cannot be separated; control
            flow that depends on images' values; a model without blocks, or one that does not say its image shape.

    Example:
        >>> teacher = split(create_model("vit_large_patch16_224"), [6, 6, 6, 6])
        >>> teacher = split(create_model("swin_tiny_patch4_window7_224"), "balanced:4")
    """
    return cuttable_of(model, image_shape).cut(parts)


def resolve_depths(model: nn.Module, parts: Parts, image_shape: tuple[int, int, int] | None = None) -> tuple[int, ...]:
    """Number of units in each module for `split(model, parts)`; M2MKDError where the parts do not fit."""
    return cuttable_of(model, image_shape).depths(parts)


class _Cuttable(ABC):
    """A model of which the stage of any units can be made."""

    units: int
    why_no_more = ""

    @abstractmethod
    def stage(self, start: int, stop: int) -> nn.Module:
        """Units `start` to `stop` (exclusive) as a module."""

    def cut(self, parts: Parts) -> ModuleChain:
        stages, start = [], 0
        for slot, depth in enumerate(self.depths(parts)):
            stage = self.stage(start, start + depth)
            stage.slot = slot
            stages.append(stage)
            start += depth
        return ModuleChain(stages)

    def depths(self, parts: Parts) -> tuple[int, ...]:
        if isinstance(parts, str):
            balanced = re.fullmatch(r"balanced:(\d+)", parts)
            if balanced:
                count = self._checked_count(int(balanced[1]))
                return _balanced_depths([_size(self.stage(i, i + 1)) for i in range(self.units)], count)
            if not re.fullmatch(r"\d+(,\d+)*", parts):
                raise M2MKDError(
                    f"parts {parts!r} are not understood; write a count ('4'), blocks a module ('3,3,2,4') or "
                    "'balanced:4' for equal numbers of parameters"
                )
            numbers = [int(number) for number in parts.split(",")]
            parts = numbers if len(numbers) > 1 else numbers[0]
        if isinstance(parts, int):
            count = self._checked_count(parts)
            return tuple(self.units // count + (slot < self.units % count) for slot in range(count))
        depths = tuple(parts)
        if not depths or min(depths) < 1:
            raise M2MKDError(f"parts {list(depths)} hold a module without blocks; every module needs at least one")
        if sum(depths) != self.units:
            raise M2MKDError(
                f"parts {list(depths)} have {sum(depths)} blocks together, the model has {self.units}"
                f"{self.why_no_more}; change the parts to that sum, or give their number only"
            )
        return depths

    def _checked_count(self, count: int) -> int:
        if not 1 <= count <= self.units:
            raise M2MKDError(
                f"cannot cut {self.units} blocks into {count} modules; choose between 1 and {self.units}"
                f"{self.why_no_more}"
            )
        return count


class _Transformer(_Cuttable):
    """A Vision Transformer whose units are its blocks."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.units = model, len(model.blocks)

    def stage(self, start: int, stop: int) -> nn.Module:
        from m2mkd_fast.models.transformer_stage import TransformerStage

        return TransformerStage(self.model, start, stop)


class _Traced(_Cuttable):
    """Any other model, along the graph of its forward pass."""

    def __init__(self, model: nn.Module, image_shape: tuple[int, int, int] | None) -> None:
        from m2mkd_fast.models.spine import find_spine

        self.model, self.spine = model, find_spine(model, image_shape)
        self.units = len(self.spine.units)
        crossings = self.spine.crossings
        if crossings:
            more = f", and {len(crossings) - 1} such places more" if len(crossings) > 1 else ""
            blocks = sum(map(len, self.spine.units))
            self.why_no_more = f" (of its {blocks} blocks not all can be separated: {crossings[0]}{more})"

    def stage(self, start: int, stop: int) -> nn.Module:
        from m2mkd_fast.models.graph_stage import GraphStage

        return GraphStage(self.model, self.spine, start, stop)

    def cut(self, parts: Parts) -> ModuleChain:
        from m2mkd_fast.models.tracing import skeleton

        chain = super().cut(parts)
        like = next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))
        if not like.is_meta:
            generator = torch.Generator().manual_seed(0)
            images = torch.randn(1, *self.spine.image_shape, generator=generator).to(like.device, like.dtype)
            # Copies that share the parameters: modes, buffers and what layers keep between calls stay as they are.
            verify_split(skeleton(self.model).eval(), skeleton(chain).eval(), images)
        return chain


def cuttable_of(model: nn.Module, image_shape: tuple[int, int, int] | None = None) -> _Cuttable:
    """The model, traced once and ready for several cuts: its `units` are counted, `cut(parts)` gives a chain."""
    from m2mkd_fast.models.stage import Stage
    from m2mkd_fast.models.transformer_stage import check_supported

    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    # The attribute is that of a compiled module, whose class would load the compiler.
    if isinstance(model, (ModuleChain, Stage, torch.jit.ScriptModule, *parallel)) or hasattr(model, "_orig_mod"):
        raise M2MKDError(
            f"cannot cut a {type(model).__name__} into modules; pass the bare model, not a compiled, parallel or stage "
            "wrapper"
        )
    try:
        check_supported(model)
    except M2MKDError:
        published = False
    else:
        published = True
    if not published:
        return _Traced(model, image_shape)
    own = (model.in_chans, *model.patch_embed.img_size)
    if image_shape is not None and tuple(image_shape) != own:
        raise M2MKDError(f"image_shape {tuple(image_shape)} given for a model of images {own}; leave it out")
    return _Transformer(model)


def verify_split(model: nn.Module, chain: nn.Module, images: Tensor) -> None:
    """Raise M2MKDError unless `chain(images)` equals `model(images)` bit for bit.

    Both run in their present mode (train or eval) without gradients and from the same state of torch's generator, so
    that dropout draws the same numbers in both.
    """
    devices = [images.device] if images.is_cuda else []
    outputs = []
    for network in (model, chain):
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(0)
            outputs.append(network(images))
    for expected, got in zip(*map(_tensors, outputs), strict=True):
        if not torch.equal(expected, got):
            worst = (expected - got).abs().max().item() if expected.shape == got.shape else math.nan
            raise M2MKDError(
                f"the chain does not compute what the model does: outputs {list(got.shape)} and {list(expected.shape)} "
                f"differ by up to {worst:.3g}; split the model again after changing its layers, and keep both in one "
                "mode"
            )


def _tensors(output: Any) -> list[Tensor]:
    """The tensors that a model gives: one, or in train mode several where it has several heads."""
    return [output] if isinstance(output, Tensor) else [tensor for part in output for tensor in _tensors(part)]


def _balanced_depths(sizes: list[int], count: int) -> tuple[int, ...]:
    """The cut with the least sum of squared module sizes (in parameters), found by dynamic programming."""
    before = [0]
    for size in sizes:
        before.append(before[-1] + size)
    # best[k][n]: least cost of the first n blocks in k modules, and where the last of these modules starts
    best = [{0: (0, 0)}]
    for k in range(1, count + 1):
        best.append(
            {
                n: min((best[k - 1][m][0] + (before[n] - before[m]) ** 2, m) for m in best[k - 1] if m < n)
                for n in range(k, len(sizes) + 1)
            }
        )
    depths, stop = [], len(sizes)
    for k in range(count, 0, -1):
        start = best[k][stop][1]
        depths.append(stop - start)
        stop = start
    return tuple(reversed(depths))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
