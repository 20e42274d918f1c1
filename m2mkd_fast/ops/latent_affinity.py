"""Which latent hears which: log affinities from the cosine distance between signatures."""

from __future__ import annotations

import contextlib
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

TruncationImplementation = Literal["direct", "masked"]


def latent_affinity(
    receiver_signatures: Tensor,
    sender_signatures: Tensor,
    bandwidth: Tensor,
    *,
    truncation: float | None = None,
    truncation_implementation: TruncationImplementation = "direct",
    uniform: Tensor | None = None,
    temperature: float = 1.0,
    threshold: float | None = None,
    normalize: bool = False,
) -> Tensor:
    r"""Log affinity of every receiver to every sender.

    .. math::
        d_{uv} &= 1 - \hat s_u \cdot \hat s_v, \qquad \hat s = s / \max(|s|, 10^{-12}) \\
        k_{uv} &= -d_{uv} / w \quad\text{where } d_{uv} \le t, \qquad -\infty \text{ elsewhere} \\
        k^*_{buv} &= \log \sigma\big((\operatorname{logit} e^{k_{uv}} + \operatorname{logit} \upsilon_{buv}) / T\big)

    The third line is one relaxed Bernoulli draw of every edge per image, in place of k, and needs ``uniform``. As in
    ``torch.distributions`` probabilities and noise are clamped to ``[eps, 1 - eps]`` of the dtype: a truncated edge
    keeps the probability eps, and neither it nor an edge of probability 1 has a gradient. Gradients of truncated edges
    are zero without sampling, too: what a sender of weight zero says reaches no loss. (The published code can estimate
    a "straight through" gradient for them; in log space that estimate is always multiplied by zero.)

    Everything is computed in float32 at least, under autocast as well: half precision moves edges across the
        truncation.

    Args:
        receiver_signatures: ``[U, S]``.
        sender_signatures: ``[V, S]``.
        bandwidth: w, a scalar tensor.
        truncation: t, the largest distance that still connects; ``None`` connects all. Not differentiable.
        truncation_implementation: ``"direct"`` keeps d <= t (compared after the division by w, so a negative bandwidth
            turns it round), ``"masked"`` keeps d < t.
        uniform: noise ``[B, U, V]``, uniform on [0, 1); asks for sampling.
        temperature: T of the sampling.
        threshold: makes edges binary instead of sampling them: 0 where the affinity is at least this, -inf elsewhere.
        normalize: subtract the log of each row's sum. A row without any edge stays at -inf.

    Returns:
        ``[U, V]``, or ``[B, U, V]`` with ``uniform``; in the signatures' dtype, float32 at least.

    Source: Rahaman et al., Neural Attentive Circuits, arXiv 2210.08031, section 2.
    """
    return latent_affinity_reference(
        receiver_signatures,
        sender_signatures,
        bandwidth,
        truncation=truncation,
        truncation_implementation=truncation_implementation,
        uniform=uniform,
        temperature=temperature,
        threshold=threshold,
        normalize=normalize,
    )


def latent_affinity_reference(
    receiver_signatures: Tensor,
    sender_signatures: Tensor,
    bandwidth: Tensor,
    *,
    truncation: float | None = None,
    truncation_implementation: TruncationImplementation = "direct",
    uniform: Tensor | None = None,
    temperature: float = 1.0,
    threshold: float | None = None,
    normalize: bool = False,
) -> Tensor:
    """Plain PyTorch, any dtype."""
    distance = signature_distance(receiver_signatures, sender_signatures)
    bandwidth = bandwidth.to(distance.dtype)
    scaled = distance / bandwidth
    log_affinity = -scaled
    if truncation is not None:
        direct = truncation_implementation == "direct"
        cut = scaled > truncation / bandwidth if direct else distance >= truncation
        log_affinity = log_affinity.masked_fill(cut, -math.inf)
    if uniform is not None:
        log_affinity = _sample(log_affinity, uniform.to(distance.dtype), temperature)
    elif threshold is not None:
        log_affinity = torch.zeros_like(log_affinity).masked_fill(log_affinity < math.log(threshold), -math.inf)
    if normalize:
        empty = (log_affinity == -math.inf).all(dim=-1, keepdim=True)
        log_affinity = log_affinity - log_affinity.masked_fill(empty, 0.0).logsumexp(dim=-1, keepdim=True)
    return log_affinity


def signature_distance(receiver_signatures: Tensor, sender_signatures: Tensor) -> Tensor:
    """Cosine distance ``[U, V]`` of signatures ``[U, S]`` and ``[V, S]``, from 0 to 2, in float32 at least."""
    dtype = torch.promote_types(receiver_signatures.dtype, torch.float32)
    device_type = receiver_signatures.device.type
    # The meta device has no autocast to switch off.
    with contextlib.nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False):
        receivers = F.normalize(receiver_signatures.to(dtype), dim=-1)
        senders = F.normalize(sender_signatures.to(dtype), dim=-1)
        return 1.0 - receivers @ senders.mT


def _sample(log_probability: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Log of a relaxed Bernoulli variable. `log_probability` is at most 0; -inf stands for probability 0."""
    limits = torch.finfo(log_probability.dtype)
    # log p and log(1-p) from log p itself: p = exp(log p) would round to 1 near it.
    log_probability = log_probability.clamp(math.log(limits.eps), math.log1p(-limits.eps))
    uniform = uniform.clamp(limits.eps, 1.0 - limits.eps)
    logit = log_probability - torch.log(-torch.expm1(log_probability))
    noise = uniform.log() - torch.log1p(-uniform)
    return F.logsigmoid((logit + noise) / temperature).clamp(math.log(limits.tiny), math.log1p(-limits.eps))
