"""Which integers of a model's code depend on the number of images: those that differ between two traces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

# Numbers of images in the two traces.
BATCHES = (2, 3)


@dataclass(frozen=True)
class BatchInteger:
    """An integer of the model's code that depends on the number of images: `slope * images + offset`."""

    slope: int
    offset: int


def merged_arguments(first: fx.Graph, second: fx.Graph, batches: bool) -> dict[fx.Node, tuple[tuple, dict]] | None:
    """Arguments of the first graph's nodes if the second one computes the same, else None.

    With `batches` the graphs are traces with `BATCHES` images, and integers in which they differ become `BatchInteger`.
    """
    nodes, others = list(first.nodes), list(second.nodes)
    counterpart = dict(zip(nodes, others, strict=False))
    step = BATCHES[1] - BATCHES[0]

    def merge(a: Any, b: Any) -> Any:
        if isinstance(a, fx.Node) and counterpart[a] is b:
            return a
        if type(a) is type(b) and isinstance(a, list | tuple) and len(a) == len(b):
            return type(a)(merge(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: merge(a[key], b[key]) for key in a}
        if isinstance(a, slice) and isinstance(b, slice):
            return slice(merge(a.start, b.start), merge(a.stop, b.stop), merge(a.step, b.step))
        if type(a) is type(b) and not isinstance(a, fx.Node) and a == b:
            return a
        if batches and type(a) is int and type(b) is int and (b - a) % step == 0:
            slope = (b - a) // step
            return BatchInteger(slope, a - slope * BATCHES[0])
        raise _Unlike

    if [(a.op, a.target) for a in nodes] != [(b.op, b.target) for b in others]:
        return None
    try:
        return {
            a: (merge(tuple(a.args), tuple(b.args)), merge(dict(a.kwargs), dict(b.kwargs)))
            for a, b in counterpart.items()
        }
    except _Unlike:
        return None


class _Unlike(Exception):
    """Two traces differ in more than integers."""
