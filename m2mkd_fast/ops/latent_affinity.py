"""Which latent hears which: log affinities from the cosine distance between signatures."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_fast._extension import why_missing
from m2mkd_fast.autocast import without_autocast
from m2mkd_fast.backend import device_reason, select_backend, triton_reason
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.ops.philox import check_seed, philox_uniform

TruncationImplementation = Literal["direct", "masked"]


def latent_affinity(
    distance: Tensor,
    bandwidth: Tensor,
    *,
    truncation: float | None = None,
    truncation_implementation: TruncationImplementation = "direct",
    samples: int | None = None,
    seed: Tensor | None = None,
    uniform: Tensor | None = None,
    temperature: float = 1.0,
    threshold: float | None = None,
    leaky: bool = False,
    normalize: bool = False,
) -> Tensor:
    r"""Log affinity of every receiver to every sender.

    .. math::
        k_{uv} &= -d_{uv} / w \quad\text{where } d_{uv} \le t, \qquad -\infty \text{ elsewhere} \\
        k^*_{buv} &= \log \sigma\big((\operatorname{logit} e^{k_{uv}} + \operatorname{logit} \upsilon_{buv}) / T\big)

    The second line is one relaxed Bernoulli draw of every edge per image, in place of k. It needs noise: a ``seed``
    and the number of ``samples``, or ``uniform``. As in ``torch.distributions`` probabilities and noise are clamped to
    ``[eps, 1 - eps]`` of the dtype, and an edge whose probability was clamped has no gradient.

    A truncated edge is absent: -inf, sampled or not. With ``leaky``, as in the published code, a sampled one keeps the
    probability eps instead: of a row's weight a mean of 3 to 5 parts in ten million then comes over truncated edges,
    and more than a thousandth in one row of ten thousand. Either way truncated edges have no gradient. (The published
    code can estimate a "straight through" gradient for them; in log space that estimate is always multiplied by zero.)

    With the seed's 64 bits as key, the noise of edge i, counted through ``[B, U, V]``, is made of word i mod 4 of
    philox4x32-10 at counter i div 4: :math:`\upsilon = \lfloor word / 2^8 \rfloor 2^{-24} + 2^{-25}`. It has the same
    bits on every device and backend, and the backward pass makes it again instead of keeping it.

    Args:
        distance: d ``[U, V]``, of :func:`signature_distance`. Half precisions are computed in float32.
        bandwidth: w, a tensor of one number above zero.
        truncation: t, the largest distance that still connects; ``None`` connects all. Not differentiable.
        truncation_implementation: ``"direct"`` keeps d <= t, ``"masked"`` keeps d < t.
        samples: B, the number of draws with ``seed``.
        seed: an int64 tensor of one number, on the device of ``distance``.
        uniform: noise ``[B, U, V]`` in [0, 1) of one's own, instead of ``seed``. Not differentiable.
        temperature: T of the sampling.
        threshold: makes edges binary instead of sampling them: 0 where the affinity is at least this, -inf elsewhere.
            Not differentiable.
        leaky: see above; matters to sampling alone.
        normalize: subtract the log of each row's sum. A row without any edge stays at -inf.

    Returns:
        ``[U, V]``, or ``[B, U, V]`` where sampled; in the dtype of ``distance``, float32 at least.

    Raises:
        M2MKDError: an argument is not as described above. On a GPU, where looking at it would wait for the device, a
            bandwidth of zero or less gives NaN instead.

    Source: Rahaman et al., Neural Attentive Circuits, arXiv 2210.08031, section 2; Salmon et al., Parallel random
    numbers: as easy as 1, 2, 3, SC 2011 (philox).
    """
    masked = _check(distance, bandwidth, truncation, truncation_implementation, temperature, threshold)
    samples = _checked_samples(distance, samples, seed, uniform, threshold)
    dtype = torch.promote_types(distance.dtype, torch.float32)
    distance, bandwidth = distance.to(dtype), bandwidth.reshape(()).to(dtype)
    uniform = None if uniform is None else uniform.detach().to(dtype)
    if threshold is not None:
        distance, bandwidth = distance.detach(), bandwidth.detach()
    options = (truncation, masked, samples, seed, uniform, temperature, threshold, leaky)
    backend = select_backend("latent_affinity", {"cpu": _why_not_cpu(distance), "triton": _why_not_triton(distance)})
    if backend == "reference":
        log_affinity = latent_affinity_reference(distance, bandwidth, *options)
    else:
        log_affinity = _LatentAffinity.apply(backend, distance, bandwidth, *options)
    return _normalized(log_affinity) if normalize else log_affinity


def latent_affinity_reference(
    distance: Tensor,
    bandwidth: Tensor,
    truncation: float | None = None,
    masked: bool = False,
    samples: int | None = None,
    seed: Tensor | None = None,
    uniform: Tensor | None = None,
    temperature: float = 1.0,
    threshold: float | None = None,
    leaky: bool = False,
) -> Tensor:
    """:func:`latent_affinity` in plain PyTorch, for checked arguments; not normalised."""
    log_affinity = -distance / torch.where(bandwidth > 0, bandwidth, math.nan)
    cut = None
    if truncation is not None:
        cut = distance >= truncation if masked else distance > truncation
        log_affinity = log_affinity.masked_fill(cut, -math.inf)
    if seed is not None:
        uniform = philox_uniform(seed, (samples, *distance.shape), distance.dtype)
    if uniform is not None:
        log_affinity = _sample(log_affinity, uniform, temperature)
        if cut is not None and not leaky:
            log_affinity = log_affinity.masked_fill(cut, -math.inf)
    elif threshold is not None:
        # Times zero, so that NaN stays NaN.
        log_affinity = torch.where(log_affinity < math.log(threshold), -math.inf, 0.0 * log_affinity)
    return log_affinity


def signature_distance(receiver_signatures: Tensor, sender_signatures: Tensor) -> Tensor:
    r"""Cosine distance of every receiver to every sender, from 0 to 2.

    .. math:: d_{uv} = 1 - \hat s_u \cdot \hat s_v, \qquad \hat s = s / \max(|s|, 10^{-12})

    Args:
        receiver_signatures: ``[U, S]``.
        sender_signatures: ``[V, S]``.

    Returns:
        d ``[U, V]``, in float32 at least, under autocast as well: half precision moves edges across a truncation.
    """
    dtype = torch.promote_types(receiver_signatures.dtype, torch.float32)
    with without_autocast(receiver_signatures):
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


def _normalized(log_affinity: Tensor) -> Tensor:
    empty = (log_affinity == -math.inf).all(dim=-1, keepdim=True)
    return log_affinity - log_affinity.masked_fill(empty, 0.0).logsumexp(dim=-1, keepdim=True)


def _check(
    distance: Tensor,
    bandwidth: Tensor,
    truncation: float | None,
    truncation_implementation: str,
    temperature: float,
    threshold: float | None,
) -> bool:
    """Whether the distance has to be below the truncation, not just at most as large."""
    if truncation_implementation not in get_args(TruncationImplementation):
        raise UnknownNameError(
            "truncation_implementation", truncation_implementation, get_args(TruncationImplementation)
        )
    if distance.dim() != 2:
        raise M2MKDError(f"distance has shape {tuple(distance.shape)}; expected [receivers, senders]")
    if bandwidth.numel() != 1:
        raise M2MKDError(f"bandwidth has shape {tuple(bandwidth.shape)}; expected one number")
    for name, tensor in (("distance", distance), ("bandwidth", bandwidth)):
        if not tensor.is_floating_point():
            raise M2MKDError(f"{name} has dtype {tensor.dtype}; expected a floating dtype")
    if bandwidth.device != distance.device:
        raise M2MKDError(f"bandwidth is on {bandwidth.device}, distance on {distance.device}; move one of them")
    if bandwidth.device.type == "cpu" and not torch.compiler.is_compiling() and not bandwidth.item() > 0:
        raise M2MKDError(
            f"bandwidth is {bandwidth.item()}; it must be above zero: lower the learning rate of the bandwidths, or "
            "fix them with learnable_bandwidth=False"
        )
    if truncation is not None and math.isnan(truncation):
        raise M2MKDError("truncation is nan; expected a distance, or None to connect all")
    if not temperature > 0:
        raise M2MKDError(f"temperature is {temperature}; it must be above zero")
    if threshold is not None and not threshold > 0:
        raise M2MKDError(f"threshold is {threshold}; it must be above zero, or None not to make edges binary")
    return truncation_implementation == "masked"


def _checked_samples(
    distance: Tensor, samples: int | None, seed: Tensor | None, uniform: Tensor | None, threshold: float | None
) -> int | None:
    """The number of draws; None without sampling."""
    if (samples is None) != (seed is None):
        raise M2MKDError("samples and seed belong together: give both to sample, or none of them")
    if uniform is not None and seed is not None:
        raise M2MKDError("uniform and seed are two sources of noise; give one of them")
    if seed is None and uniform is None:
        return None
    if threshold is not None:
        raise M2MKDError("threshold is for edges that are not sampled; leave it, or the noise, out")
    if uniform is not None:
        if uniform.dim() != 3 or uniform.shape[1:] != distance.shape:
            raise M2MKDError(
                f"uniform has shape {tuple(uniform.shape)}; expected [samples, {', '.join(map(str, distance.shape))}]"
            )
        if not uniform.is_floating_point() or uniform.device != distance.device:
            raise M2MKDError(
                f"uniform is {uniform.dtype} on {uniform.device}; expected a floating dtype on {distance.device}"
            )
        return uniform.shape[0]
    if samples < 0:
        raise M2MKDError(f"samples is {samples}; it must not be negative")
    check_seed(seed, distance.device)
    return samples


def _why_not_cpu(distance: Tensor) -> str | None:
    return device_reason(distance, "cpu") or why_missing("_C")


def _why_not_triton(distance: Tensor) -> str | None:
    reason = triton_reason(distance)
    if reason is None and distance.dtype != torch.float32:
        reason = f"the kernel knows float32, not {distance.dtype}"
    return reason


class _LatentAffinity(torch.autograd.Function):
    """The kernels, with their gradient; nothing as large as the samples is kept for it."""

    @staticmethod
    def forward(
        ctx, backend, distance, bandwidth, truncation, masked, samples, seed, uniform, temperature, threshold, leaky
    ):
        options = (truncation, masked, samples, seed, uniform, temperature, threshold, leaky)
        ops = torch.ops.m2mkd_fast
        forward = ops._latent_affinity_forward if backend == "cpu" else ops._latent_affinity_triton_forward
        ctx.save_for_backward(distance, bandwidth, seed, uniform)
        ctx.backend, ctx.truncation, ctx.masked, ctx.samples = backend, truncation, masked, samples
        ctx.temperature, ctx.leaky = temperature, leaky
        return forward(distance, bandwidth, *options)

    @staticmethod
    def backward(ctx, grad):
        distance, bandwidth, seed, uniform = ctx.saved_tensors
        truncation, masked = ctx.truncation, ctx.masked
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Gradients of the gradient (create_graph=True) come from plain PyTorch: the kernels have none.
            log_affinity = latent_affinity_reference(
                distance, bandwidth, truncation, masked, ctx.samples, seed, uniform, ctx.temperature, None, ctx.leaky
            )
            needed = [
                tensor for tensor, need in zip((distance, bandwidth), ctx.needs_input_grad[1:3], strict=True) if need
            ]
            found = iter(torch.autograd.grad(log_affinity, needed, grad, create_graph=True))
            gradients = tuple(next(found) if need else None for need in ctx.needs_input_grad[1:3])
        else:
            ops = torch.ops.m2mkd_fast
            backward = ops._latent_affinity_backward if ctx.backend == "cpu" else ops._latent_affinity_triton_backward
            gradients = backward(grad, distance, bandwidth, truncation, masked, seed, uniform, ctx.temperature)
        return None, *gradients, *(None,) * 8


torch.library.define(
    "m2mkd_fast::_latent_affinity_triton_forward",
    "(Tensor distance, Tensor bandwidth, float? truncation, bool masked, SymInt? samples, Tensor? seed,"
    " Tensor? uniform, float temperature, float? threshold, bool leaky) -> Tensor",
)
torch.library.define(
    "m2mkd_fast::_latent_affinity_triton_backward",
    "(Tensor grad, Tensor distance, Tensor bandwidth, float? truncation, bool masked, Tensor? seed, Tensor? uniform,"
    " float temperature) -> (Tensor grad_distance, Tensor grad_bandwidth)",
)


@torch.library.impl("m2mkd_fast::_latent_affinity_triton_forward", ("cuda", "cpu"))
def _triton_forward(*args: Any) -> Tensor:
    from m2mkd_fast.kernels import latent_affinity as kernels  # here, because it imports Triton

    return kernels.forward(*args)


@torch.library.impl("m2mkd_fast::_latent_affinity_triton_backward", ("cuda", "cpu"))
def _triton_backward(*args: Any) -> tuple[Tensor, Tensor]:
    from m2mkd_fast.kernels import latent_affinity as kernels

    return kernels.backward(*args)


def _forward_fake(distance, bandwidth, truncation, masked, samples, seed, uniform, temperature, threshold, leaky):
    return distance.new_empty(distance.shape if samples is None else (samples, *distance.shape))


def _backward_fake(grad, distance, bandwidth, truncation, masked, seed, uniform, temperature):
    return torch.empty_like(distance, memory_format=torch.contiguous_format), torch.empty_like(bandwidth)


torch.library.register_fake("m2mkd_fast::_latent_affinity_triton_forward", _forward_fake)
torch.library.register_fake("m2mkd_fast::_latent_affinity_triton_backward", _backward_fake)
if why_missing("_C") is None:
    torch.library.register_fake("m2mkd_fast::_latent_affinity_forward", _forward_fake)
    torch.library.register_fake("m2mkd_fast::_latent_affinity_backward", _backward_fake)
