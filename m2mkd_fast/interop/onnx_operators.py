"""How PyTorch's operators that the exporter has no ONNX form for are written in ONNX: those that routing needs."""

from __future__ import annotations

from collections.abc import Callable

import torch


def onnx_operators() -> dict[Callable, Callable]:
    """Translations for `torch.onnx.export(custom_translation_table=...)`."""
    from onnxscript import opset18 as op

    def sort(self, stable=None, dim: int = -1, descending: bool = False):
        # ONNX's TopK gives equal values in the order of their indices: taken of all elements it is a stable sort.
        size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    def searchsorted(
        sorted_sequence, self, out_int32: bool = False, right: bool = False, side: str | None = None, sorter=None
    ):
        # Of one sorted sequence: how many of its elements lie before each value.
        elements, values = op.Unsqueeze(sorted_sequence, [0]), op.Unsqueeze(self, [1])
        before = op.LessOrEqual(elements, values) if right or side == "right" else op.Less(elements, values)
        return op.ReduceSum(op.Cast(before, to=7), [1], keepdims=0)

    return {torch.ops.aten.sort.stable: sort, torch.ops.aten.searchsorted.Tensor: searchsorted}
