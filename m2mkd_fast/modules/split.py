"""Take a Vision Transformer apart into a chain of modules that computes the same, bit for bit."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.modules.chain import ModuleChain

Parts = int | str | Sequence[int]


def split(model: nn.Module, parts: Parts) -> ModuleChain:
    """Cut a model between blocks into a chain of modules that share the model's parameters.

    `chain(x)` equals `model(x)` bit for bit; `verify_split` proves it on given images. The first module also owns the
    patch embedding and the tokens and position embedding added to it, the last one the final norm and the classifier.

    Args:
        model: timm's VisionTransformer or a subclass that keeps its forward pass: ViT, DeiT, DeiT distilled, V-MoE.
        parts: how to cut the model's blocks.
            `4`: four modules of as equal a number of blocks as possible, earlier ones larger.
            `[3, 3, 2, 4]` or `"3,3,2,4"`: blocks in each module.
            `"balanced:4"`: four modules with as equal a number of parameters as possible.

    Raises:
        M2MKDError: a model of another kind, or parts that do not fit its blocks. Nothing has been changed then.

    Example:
        >>> teacher = split(create_model("vit_large_patch16_224"), [6, 6, 6, 6])
    """
    from m2mkd_fast.models.transformer_stage import TransformerStage, check_supported

    check_supported(model)
    stages, start = [], 0
    for slot, depth in enumerate(resolve_depths(model, parts)):
        stage = TransformerStage(model, start, start + depth)
        stage.slot = slot
        stages.append(stage)
        start += depth
    return ModuleChain(stages)


def resolve_depths(model: nn.Module, parts: Parts) -> tuple[int, ...]:
    """Number of blocks in each module for `split(model, parts)`; M2MKDError where the parts do not fit."""
    blocks = len(model.blocks)
    if isinstance(parts, str):
        balanced = re.fullmatch(r"balanced:(\d+)", parts)
        if balanced:
            return _balanced_depths(model, _checked_count(int(balanced[1]), blocks))
        if not re.fullmatch(r"\d+(,\d+)*", parts):
            raise M2MKDError(
                f"parts {parts!r} are not understood; write a count ('4'), blocks a module ('3,3,2,4') or "
                "'balanced:4' for equal numbers of parameters"
            )
        numbers = [int(number) for number in parts.split(",")]
        parts = numbers if len(numbers) > 1 else numbers[0]
    if isinstance(parts, int):
        count = _checked_count(parts, blocks)
        return tuple(blocks // count + (slot < blocks % count) for slot in range(count))
    depths = tuple(parts)
    if not depths or min(depths) < 1:
        raise M2MKDError(f"parts {list(depths)} hold a module without blocks; every module needs at least one")
    if sum(depths) != blocks:
        raise M2MKDError(
            f"parts {list(depths)} have {sum(depths)} blocks together, the model has {blocks}; "
            "change the parts to that sum, or give their number only"
        )
    return depths


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
    expected, got = outputs
    if not torch.equal(expected, got):
        worst = (expected - got).abs().max().item() if expected.shape == got.shape else math.nan
        raise M2MKDError(
            f"the chain does not compute what the model does: outputs {list(got.shape)} and {list(expected.shape)} "
            f"differ by up to {worst:.3g}; split the model again after changing its layers, and keep both in one mode"
        )


def _checked_count(count: int, blocks: int) -> int:
    if not 1 <= count <= blocks:
        raise M2MKDError(f"cannot cut {blocks} blocks into {count} modules; choose between 1 and {blocks}")
    return count


def _balanced_depths(model: nn.Module, count: int) -> tuple[int, ...]:
    """The cut with the least sum of squared module sizes (in parameters), found by dynamic programming."""
    sizes = [_size(block) for block in model.blocks]
    tail_names = ("norm", "attn_pool", "fc_norm", "head", "head_dist")
    tail = sum(_size(getattr(model, name)) for name in tail_names if getattr(model, name, None) is not None)
    everything = {id(parameter): parameter.numel() for parameter in model.parameters()}
    sizes[0] += sum(everything.values()) - sum(sizes) - tail
    sizes[-1] += tail
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
