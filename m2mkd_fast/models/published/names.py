"""Tensor names: grouped for people to read, cleaned of wrappers' prefixes, compared with those that are expected."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from m2mkd_fast.errors import M2MKDError

_NUMBER = re.compile(r"\d+")
_SINGLE_EXPERT = re.compile(r"(.*)\.(\d+)\.((?:htoh4|h4toh)\.(?:weight|bias))")
# What DistributedDataParallel and torch.compile put before every name.
_WRAPPERS = ("module.", "_orig_mod.")


def grouped(names: Iterable[str]) -> list[str]:
    """All names, those that differ in numbers alone as one: ``blocks.{0..11}.mlp.fc{1..2}.bias``."""
    places: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        places.setdefault(tuple(_NUMBER.split(name)), []).append(tuple(int(text) for text in _NUMBER.findall(name)))
    return [text for pieces, numbers in places.items() for text in _ranges(pieces, numbers)]


def _ranges(pieces: tuple[str, ...], numbers: list[tuple[int, ...]]) -> list[str]:
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    if math.prod(len(column) for column in columns) == len(numbers):
        ranges = [*(_range(column) for column in columns), ""]
        return ["".join(text for pair in zip(pieces, ranges, strict=True) for text in pair)]
    first = next(place for place, column in enumerate(columns) if len(column) > 1)
    return [
        text for value in columns[first] for text in _ranges(pieces, [row for row in numbers if row[first] == value])
    ]


def _range(values: Sequence[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    consecutive = values[-1] - values[0] == len(values) - 1
    return f"{{{values[0]}..{values[-1]}}}" if consecutive else "{" + ",".join(map(str, values)) + "}"


def check_names(
    state: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]], source: str | os.PathLike[str], what: str
) -> None:
    """Raise one M2MKDError that lists every foreign, missing and misshapen tensor, foreign ones with our nearest name.

    Args:
        state: tensors by name.
        expected: the shapes that a model of ours has.
        source: where the state comes from, for the message.
        what: what the state was taken for, for the message.
    """
    foreign = [name for name in state if name not in expected]
    missing = [name for name in expected if name not in state]
    misshapen = [
        f"{name} is {list(state[name].shape)}, {list(shape)} expected"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != tuple(shape)
    ]
    if not (foreign or missing or misshapen):
        return
    known = {_NUMBER.sub("#", text): text for text in grouped(expected)}
    problems = []
    if foreign:
        problems.append(
            f"{len(foreign)} foreign names: " + "; ".join(_with_nearest(text, known) for text in grouped(foreign))
        )
    if missing:
        problems.append(f"{len(missing)} names are missing: " + "; ".join(grouped(missing)))
    if misshapen:
        problems.append(f"{len(misshapen)} tensors have another shape: " + "; ".join(misshapen))
    raise M2MKDError(
        f"{os.fspath(source)} does not fit {what}. "
        + ". ".join(problems)
        + ". Rename or remove foreign tensors, or say with --option key=value how the model differs from this one"
    )


def _with_nearest(text: str, known: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(_NUMBER.sub("#", text), known, n=1, cutoff=0.3)
    return f"{text} (nearest of ours: {known[near[0]]})" if near else f"{text} (nothing of ours is near)"


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without the prefixes of DistributedDataParallel and torch.compile, where all names have them."""
    state = dict(state)
    for _ in range(4):  # each wraps at most twice
        for prefix in _WRAPPERS:
            if state and all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def with_stacked_experts(state: Mapping[str, Tensor], source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """FastMoE's single experts (``experts.3.htoh4.weight [1, H, D]``) as one tensor ``experts.htoh4.weight [E, H, D]``.

    Raises:
        M2MKDError: an expert is missing, or the experts of a layer have different shapes.
    """
    stacked: dict[str, Tensor] = {}
    singles: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        match = _SINGLE_EXPERT.fullmatch(name)
        if match is None:
            stacked[name] = tensor
        else:
            singles.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
    for name, experts in singles.items():
        absent = sorted(set(range(max(experts) + 1)) - set(experts))
        shapes = {tuple(tensor.shape) for tensor in experts.values()}
        if absent or len(shapes) > 1 or next(iter(shapes))[0] != 1:
            raise M2MKDError(
                f"{os.fspath(source)}: the single experts of {name} cannot be stacked: experts {sorted(experts)} of "
                f"shapes {sorted(shapes)}; experts 0 to E-1 of one shape [1, ...] are expected"
            )
        stacked[name] = torch.cat([experts[index] for index in sorted(experts)])
    return stacked
