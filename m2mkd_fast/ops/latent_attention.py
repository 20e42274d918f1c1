"""Attention between latents whose scores are shifted by log affinities."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def latent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_affinity: Tensor | None = None,
    log_scale: Tensor | None = None,
) -> Tensor:
    r"""Messages of V senders to U receivers.

    .. math::
        P = \mathrm{softmax}_v\big(q k^\top / \sqrt{D} + a\big), \qquad o = (P \circ e^{r})\, v

    A receiver whose affinities are all -inf hears nobody: its message is 0 (and not NaN), and so are the gradients.

    Args:
        query: q ``[B, H, U, D]``.
        key: k ``[B, H, V, D]``.
        value: v ``[B, H, V, D]``.
        log_affinity: a ``[U, V]`` or ``[B, U, V]``, the same for all heads; ``None`` for plain attention.
        log_scale: r, shaped like ``log_affinity``; multiplies the weights after the softmax.

    Returns:
        o ``[B, H, U, D]``, in the dtype of ``value``.

    Source: Rahaman et al., Neural Attentive Circuits, arXiv 2210.08031, section 2.
    """
    return latent_attention_reference(query, key, value, log_affinity, log_scale)


def latent_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_affinity: Tensor | None = None,
    log_scale: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch, any dtype."""
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if log_affinity is None:
        weights = scores.softmax(dim=-1)
    else:
        # [U, V] or [B, U, V] -> [1 or B, 1, U, V]
        log_affinity = log_affinity.unsqueeze(-3)
        empty = (log_affinity == -math.inf).all(dim=-1, keepdim=True)
        weights = (scores + log_affinity.masked_fill(empty, 0.0)).softmax(dim=-1).masked_fill(empty, 0.0)
    if log_scale is not None:
        weights = weights * log_scale.unsqueeze(-3).exp()
    return torch.matmul(weights.to(value.dtype), value)
