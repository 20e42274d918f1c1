"""Floating-point operations of the operators, for PyTorch's counter, which otherwise counts nothing in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]


def flop_counter() -> FlopCounterMode:
    """PyTorch's :class:`~torch.utils.flop_counter.FlopCounterMode`, silent, which knows this package's operators too.

    As PyTorch counts: matrix products alone, two operations a multiplication and addition, and for the backward pass of
    attention also the scores that it makes again. Experts are counted with all rows of their assignment, dropped
    choices included, attention with all pairs, absent edges included.

    Example:
        >>> with flop_counter() as counter:
        ...     model(images)
        >>> counter.get_total_flops()
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, because it imports Triton

    mapping = {}
    for name, formula in _FORMULAS.items():
        for backend in ("", "triton_"):
            operator = name.replace("*", backend)
            if hasattr(torch.ops.m2mkd_fast, operator):  # compiled operators may be missing, as may their modules
                mapping[getattr(torch.ops.m2mkd_fast, operator)] = formula
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _expert_mlp_forward(x: Shape, token: Shape, *others: object, **_: object) -> int:
    up_weight, down_weight = others[4], others[6]
    return 2 * token[0] * (_products_a_row(up_weight) + _products_a_row(down_weight))


def _expert_mlp_backward(
    grad: Shape, preactivation: Shape, x: Shape, token: Shape, *others: object, **_: object
) -> int:
    up, down = _products_a_row(others[4]), _products_a_row(others[6])
    need_x, need_parameters = others[-2:]
    return 2 * token[0] * (down + bool(need_x) * up + bool(need_parameters) * (up + down))


def _products_a_row(weight: Shape) -> int:
    """Multiplications of one row with an expert's matrix, of weights ``[E, out, in]``."""
    return weight[1] * weight[2]


def _latent_attention_forward(query: Shape, key: Shape, *_: object, **__: object) -> int:
    batch, heads, receivers, width = query
    return 4 * batch * heads * receivers * key[2] * width


def _latent_attention_backward(grad: Shape, query: Shape, key: Shape, *_: object, **__: object) -> int:
    return 5 * _latent_attention_forward(query, key) // 2


def _read_in_attention_forward(query: Shape, inputs: Shape, *_: object, **__: object) -> int:
    batch, heads, latents, width = query
    _, tokens, channels = inputs
    return 4 * batch * heads * latents * channels * (width + tokens)


def _read_in_attention_backward(grad: Shape, query: Shape, inputs: Shape, *_: object, **__: object) -> int:
    return 2 * _read_in_attention_forward(query, inputs)


# The star stands for nothing, or for "triton_".
_FORMULAS: dict[str, Callable[..., int]] = {
    "_expert_mlp_*forward": _expert_mlp_forward,
    "_expert_mlp_*backward": _expert_mlp_backward,
    "_latent_attention_*forward": _latent_attention_forward,
    "_latent_attention_*backward": _latent_attention_backward,
    "_read_in_attention_*forward": _read_in_attention_forward,
    "_read_in_attention_*backward": _read_in_attention_backward,
}
