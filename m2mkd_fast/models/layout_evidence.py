"""Which axis of a feature map holds the channels, told by what a model does with the map."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

MapLayout = Literal["channels_last", "channels_first"]

_CHANNELS_FIRST = {
    "conv2d", "batch_norm", "group_norm", "instance_norm", "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d",
    "max_pool2d", "interpolate", "conv_transpose2d", "pixel_shuffle", "pixel_unshuffle", "unfold",
}  # fmt: skip
_CHANNELS_LAST = {"linear", "layer_norm", "rms_norm"}


class LayoutEvidence:
    """Follows feature maps `[B, ., ., .]` until an operation takes one axis for the channels.

    A convolution reads channels first, a linear map channels last, and so on, through permutations of the axes and
    operations on each element. A tensor is known by its object, which has to be kept alive by the caller.
    """

    def __init__(self) -> None:
        # Axes taken for the channels, counted in the tensor first followed; and where its axes are in this one.
        self._followed: dict[int, tuple[list[int], tuple[int, ...]]] = {}
        self._alive: list[Tensor] = []

    def follow(self, tensor: Tensor) -> None:
        """Start to collect evidence on a tensor, unless it is an element-wise function of one that is followed."""
        if tensor.ndim == 4 and id(tensor) not in self._followed:
            self._followed[id(tensor)] = ([], (0, 1, 2, 3))
            self._alive.append(tensor)

    def of(self, tensor: Tensor) -> MapLayout | None:
        """The first evidence on a tensor; None without any."""
        findings, axes = self._followed.get(id(tensor), ([], ()))
        return {1: "channels_first", 3: "channels_last"}.get(axes.index(findings[0])) if findings else None

    def observe(self, name: str, args: tuple, result: Any) -> None:
        """Learn from an operation and its arguments."""
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if tensor is None or id(tensor) not in self._followed:
            return
        findings, axes = self._followed[id(tensor)]
        found = _evidence(name, args, tensor, result)
        if found is not None:
            findings.append(axes[1] if found == "channels_first" else axes[3])
        if not isinstance(result, Tensor) or result.ndim != 4 or id(result) in self._followed or found is not None:
            return
        if name in ("permute", "transpose"):
            order = _order(name, args)
            self._followed[id(result)] = (findings, tuple(axes[axis] for axis in order))
        elif result.shape == tensor.shape and name != "matmul":
            self._followed[id(result)] = (findings, axes)
        else:
            return
        self._alive.append(result)


def _evidence(name: str, args: tuple, tensor: Tensor, result: Any) -> MapLayout | None:
    if name in _CHANNELS_FIRST:
        return "channels_first"
    if name in _CHANNELS_LAST:
        return "channels_last"
    if name == "mean" and len(args) > 1 and isinstance(args[1], list | tuple):
        return {(2, 3): "channels_first", (1, 2): "channels_last"}.get(tuple(axis % 4 for axis in args[1]))
    if name in ("flatten", "view", "reshape") and isinstance(result, Tensor) and result.ndim != 4:
        batch, a, b, c = tensor.shape
        first = result.ndim > 2 and result.shape[1] == a and (result.ndim > 3 or result.shape[2] == b * c)
        last = result.ndim > 2 and result.shape[-1] == c and (result.ndim > 3 or result.shape[1] == a * b)
        if first != last and result.shape[0] == batch:
            return "channels_first" if first else "channels_last"
    return None


def _order(name: str, args: tuple) -> tuple[int, ...]:
    if name == "permute":
        order = args[1] if isinstance(args[1], list | tuple) else args[1:]
        return tuple(axis % 4 for axis in order)
    order = [0, 1, 2, 3]
    i, j = args[1] % 4, args[2] % 4
    order[i], order[j] = j, i
    return tuple(order)
