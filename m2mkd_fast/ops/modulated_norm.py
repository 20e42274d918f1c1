"""Layer norm followed by one or several per-latent scales: the prologue of every modulated projection."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def modulated_norm(inputs: Tensor, weight: Tensor, bias: Tensor, scales: Tensor, eps: float = 1e-5) -> Tensor:
    r"""Normalise once, scale M times.

    .. math::
        y_{mbnc} = s_{mnc} \Big(\gamma_c \frac{x_{bnc} - \mu_{bn}}{\sqrt{\sigma^2_{bn} + \epsilon}} + \beta_c\Big)

    Keys and values read the same normalised senders with two different scales; one pass over ``inputs`` serves both.

    Args:
        inputs: x ``[B, N, C]``.
        weight: gamma ``[C]``.
        bias: beta ``[C]``.
        scales: s ``[M, N, C]``, or ``[M, 1, C]`` for one scale for all latents.
        eps: added to the variance.

    Returns:
        y ``[M, B, N, C]``.

    Source: the modulated linear layer of Rahaman et al., Neural Attentive Circuits, arXiv 2210.08031.
    """
    return modulated_norm_reference(inputs, weight, bias, scales, eps)


def modulated_norm_reference(inputs: Tensor, weight: Tensor, bias: Tensor, scales: Tensor, eps: float = 1e-5) -> Tensor:
    """Plain PyTorch, any dtype."""
    return F.layer_norm(inputs, inputs.shape[-1:], weight, bias, eps) * scales.unsqueeze(1)
