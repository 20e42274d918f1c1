"""The dicts of the published PyTorch checkpoints: taken apart into one state and plain facts, and made again.

- m2mKD, Deep Incubation: ``{'model': state, 'model_stages': [state of each stage], 'optimizer': ..., 'epoch': ...}``;
  a transformer's state names each tensor twice, as ``blocks.<i>.*`` and as ``stages.<i>.*``.
- Neural Attentive Circuits: ``{'model': state, 'optimizer': ..., 'model_ema': ..., 'epoch': ...}``.
- Teacher modules: ``{'model_name', 'block_index', 'block_state_dict', 'divided_depths'}``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.published.circuits import DRAWN
from m2mkd_fast.models.published.names import with_stacked_experts, without_wrappers
from m2mkd_fast.models.published.record import Published

_STAGE = re.compile(r"stages\.(\d+)\.(.+)")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


class Unpacked(NamedTuple):
    """One state, each tensor once; plain values; what was left out."""

    state: dict[str, Tensor]
    facts: dict[str, Any]
    left_out: list[str]


def unpack(tree: Mapping[str, Any], source: str | os.PathLike[str], weights: str | None = None) -> Unpacked:
    """Take a checkpoint's dict apart.

    Args:
        tree: the dict.
        source: where it comes from, for error messages.
        weights: the entry with the weights, such as `model_ema`; by default the first of those that are published.

    Raises:
        M2MKDError: there are no weights in it, or two places of it contradict each other.
    """
    if tree and all(isinstance(value, Tensor) for value in tree.values()):
        state, stages, used = dict(tree), None, set(tree)
    else:
        known = (weights,) if weights is not None else ("block_state_dict", "model", "state_dict")
        key = next((name for name in known if _is_state(tree.get(name))), None)
        stages = tree.get("model_stages") or None
        if key is None and (stages is None or weights is not None):
            raise M2MKDError(
                f"{os.fspath(source)} has no weights under {' or '.join(map(repr, known))}; it has "
                f"{', '.join(map(repr, tree)) or 'nothing'}. Say where they are with --option weights=NAME"
            )
        stages = stages if key in ("model", None) else None
        if stages is not None and not (isinstance(stages, list) and all(_is_state(stage) for stage in stages)):
            raise M2MKDError(f"{os.fspath(source)}: model_stages is no list of dicts of tensors; save it again")
        state = dict(tree[key]) if key is not None else _joined(stages)
        used = {key, "model_stages"}
    facts = {name: _plain(value) for name, value in tree.items() if name not in used and _is_plain(value)}
    left_out = [_described(name, tree[name]) for name in tree if name not in used and name not in facts]
    state = with_stacked_experts(without_wrappers(state), source)
    state, depths = _without_stages(state, source)
    if stages is not None:
        listed, depths = _joined([with_stacked_experts(stage, source) for stage in stages]), _depths(stages)
        _agree(state, listed, source, "model_stages")
    if depths:
        facts.setdefault("divided_depths", depths)
    return Unpacked(state, facts, left_out)


def pack(published: Published) -> tuple[dict[str, Any], list[str]]:
    """The dict that the published code saves, and the names of our tensors that it has no place for.

    Raises:
        M2MKDError: the published layout needs a fact that is missing.
    """
    state, facts = published.state, published.facts
    if published.kind == "circuit":
        return {"model": state}, []
    if published.kind == "circuit module":
        kept = {name: tensor for name, tensor in state.items() if name not in DRAWN}
        return {"model": kept, "model_stages": []}, [name for name in DRAWN if name in state]
    if published.kind == "vit module":
        needed = ("model_name", "block_index", "divided_depths")
        absent = [name for name in needed if name not in facts]
        if absent:
            raise M2MKDError(
                f"a published teacher module says where in the teacher it stands; give {', '.join(absent)} with "
                "--option, for example --option model_name=vit_large_patch16_224 block_index=0 divided_depths=[6,6,6,6]"
            )
        return {name: facts[name] for name in needed} | {"block_state_dict": state}, []
    depth = 1 + max(int(match[1]) for name in state if (match := _BLOCK.match(name)))
    depths = [depth] if published.part is not None else facts.get("divided_depths")
    if depths is None or sum(depths) != depth:
        raise M2MKDError(
            f"the published layout names each tensor by its stage, too; say how the {depth} blocks are divided, for "
            "example --option divided_depths=[3,3,3,3]"
        )
    stages = _divided(state, depths)
    named = {f"stages.{index}.{name}": tensor for index, stage in enumerate(stages) for name, tensor in stage.items()}
    return {"model": state | named, "model_stages": stages}, []


def _without_stages(
    state: Mapping[str, Tensor], source: str | os.PathLike[str]
) -> tuple[dict[str, Tensor], list[int] | None]:
    """The state without the second names `stages.<i>.*`, which must agree with the first, and the stages' depths."""
    stages: dict[int, dict[str, Tensor]] = {}
    kept: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _STAGE.fullmatch(name)
        if match is None:
            kept[name] = tensor
        else:
            stages.setdefault(int(match[1]), {})[match[2]] = tensor
    if not any(_BLOCK.match(name) for stage in stages.values() for name in stage):  # another model's `stages`, or none
        return dict(state), None
    listed = [stages.get(index, {}) for index in range(max(stages) + 1)]
    joined = _joined(listed)
    if not any(_BLOCK.match(name) for name in kept):
        return kept | joined, _depths(listed)
    _agree(kept, joined, source, "stages.<i>")
    return kept, _depths(listed)


def _joined(stages: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The states of stages, whose blocks count from 0 in each, as one state."""
    joined: dict[str, Tensor] = {}
    start = 0
    for stage, depth in zip(stages, _depths(stages), strict=True):
        for name, tensor in stage.items():
            match = _BLOCK.fullmatch(name)
            joined[f"blocks.{start + int(match[1])}.{match[2]}" if match else name] = tensor
        start += depth
    return joined


def _divided(state: Mapping[str, Tensor], depths: Sequence[int]) -> list[dict[str, Tensor]]:
    """The states of stages with so many blocks each."""
    stages: list[dict[str, Tensor]] = [{} for _ in depths]
    place = [(index, block) for index, depth in enumerate(depths) for block in range(depth)]
    for name, tensor in state.items():
        match = _BLOCK.fullmatch(name)
        if match is not None:
            index, block = place[int(match[1])]
            stages[index][f"blocks.{block}.{match[2]}"] = tensor
        else:
            stages[-1 if name.startswith(("norm.", "head.")) else 0][name] = tensor
    return stages


def _depths(stages: Sequence[Mapping[str, Tensor]]) -> list[int]:
    return [max((int(match[1]) + 1 for name in stage if (match := _BLOCK.match(name))), default=0) for stage in stages]


def _agree(
    state: Mapping[str, Tensor], listed: Mapping[str, Tensor], source: str | os.PathLike[str], place: str
) -> None:
    different = [name for name in listed if name not in state or not _equal(state[name], listed[name])]
    if different:
        raise M2MKDError(
            f"{os.fspath(source)} contradicts itself: its {place} say otherwise than the rest about "
            f"{', '.join(different)}; save the checkpoint again from one model"
        )


def _equal(first: Tensor, second: Tensor) -> bool:
    if first.is_meta or second.is_meta or (first.data_ptr() == second.data_ptr() and first.stride() == second.stride()):
        return first.shape == second.shape
    return torch.equal(first, second)


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, bool | int | float | str)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _described(name: str, value: Any) -> str:
    tensors = sum(1 for _ in _tensors(value))
    return f"{name} ({tensors} tensors)" if tensors else name


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
