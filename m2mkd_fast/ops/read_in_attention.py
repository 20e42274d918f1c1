"""Attention from latents to inputs where every latent has key and value projections of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def read_in_attention(
    query: Tensor,
    inputs: Tensor,
    key_weight: Tensor,
    key_scale: Tensor,
    value_weight: Tensor,
    value_scale: Tensor,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
) -> Tensor:
    r"""Read V inputs into U latents, latent u through the projections :math:`W \operatorname{diag}(s_u)`.

    .. math::
        k_{uvh} = W^K_h (s^K_u \circ x_v) + b^K_h, \quad v_{uvh} = W^V_h (s^V_u \circ x_v) + b^V_h, \quad
        o_{uh} = \sum_v \mathrm{softmax}_v\Big(\frac{q_{uh} \cdot k_{uvh}}{\sqrt D}\Big)\, v_{uvh}

    Keys and values of all pairs would be ``[B, H, U, V, D]``. They never exist: the projections move to the other side
    of both products, which is exact,

    .. math::
        \tilde q_{uh} = s^K_u \circ (W^K_h)^\top q_{uh} / \sqrt D, \quad
        P = \mathrm{softmax}_v(\tilde q_{uh} \cdot x_v), \quad
        o_{uh} = W^V_h \Big(s^V_u \circ \sum_v P_{uhv}\, x_v\Big) + b^V_h

    and needs a number of operations that is smaller by about the size of a head. The key bias cancels in the softmax;
    it is kept so that it has a gradient (zero up to rounding).

    Args:
        query: q ``[B, H, U, D]``.
        inputs: x ``[B, V, C]``, already normalised.
        key_weight: ``[H * D, C]``, rows ordered by head.
        key_scale: ``[U, C]``, or ``[1, C]`` for one scale for all latents.
        value_weight: ``[H * D, C]``.
        value_scale: ``[U, C]`` or ``[1, C]``.
        key_bias: ``[H * D]``.
        value_bias: ``[H * D]``.

    Returns:
        o ``[B, H, U, D]``.

    Source: Rahaman et al., Neural Attentive Circuits, arXiv 2210.08031, section 2 (read-in).
    """
    heads, dim = query.shape[1], query.shape[-1]
    query = query / math.sqrt(dim)
    absorbed = torch.einsum("bhud,hdc->bhuc", query, key_weight.unflatten(0, (heads, dim))) * key_scale
    scores = torch.einsum("bhuc,bvc->bhuv", absorbed, inputs)
    if key_bias is not None:
        scores = scores + torch.einsum("bhud,hd->bhu", query, key_bias.unflatten(0, (heads, dim))).unsqueeze(-1)
    gathered = torch.einsum("bhuv,bvc->bhuc", scores.softmax(dim=-1), inputs) * value_scale
    messages = torch.einsum("bhuc,hdc->bhud", gathered, value_weight.unflatten(0, (heads, dim)))
    if value_bias is not None:
        messages = messages + value_bias.unflatten(0, (heads, 1, dim))
    return messages


def read_in_attention_reference(
    query: Tensor,
    inputs: Tensor,
    key_weight: Tensor,
    key_scale: Tensor,
    value_weight: Tensor,
    value_scale: Tensor,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
) -> Tensor:
    """The definition with all keys and values, plain PyTorch, any dtype. Memory grows with B x U x V x H x D."""
    keys = torch.nn.functional.linear(inputs.unsqueeze(1) * key_scale.unsqueeze(1), key_weight, key_bias)
    values = torch.nn.functional.linear(inputs.unsqueeze(1) * value_scale.unsqueeze(1), value_weight, value_bias)
    return attend_to_own_keys(query, keys, values)


def attend_to_own_keys(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of queries ``[B, H, U, D]`` to keys and values ``[B, U or 1, V, H * D]`` of their own."""
    heads, dim = query.shape[1], query.shape[-1]
    keys, values = (tensor.unflatten(-1, (heads, dim)).permute(0, 3, 1, 2, 4) for tensor in (keys, values))
    scores = (query.unsqueeze(-2) * keys).sum(dim=-1) / math.sqrt(dim)
    return (scores.softmax(dim=-1).unsqueeze(-1) * values).sum(dim=-2)
