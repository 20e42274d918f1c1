"""Attention between latents whose scores are shifted by log affinities."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from m2mkd_fast._extension import why_missing
from m2mkd_fast.backend import device_reason, select_backend, triton_reason
from m2mkd_fast.errors import M2MKDError

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_HEAD_DIMS = (1, 128)  # narrow heads are padded


def latent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_affinity: Tensor | None = None,
    log_scale: Tensor | None = None,
    *,
    skip_empty_tiles: bool = False,
) -> Tensor:
    r"""Messages of V senders to U receivers.

    .. math::
        P = \mathrm{softmax}_v\big(q k^\top / \sqrt{D} + a\big), \qquad o = (P \circ e^{r})\, v

    An affinity of -inf means that there is no edge, and no gradient either. A receiver without edges hears nobody: its
    message is 0 (and not NaN), and so are the gradients.

    On a CPU, absent edges of a graph with less than 60 % of them cost nothing. The gradient of a is the sum over heads
    (and images, where these share a), taken in a fixed order: two runs give the same bits. Half precisions are computed
    in float32.

    Args:
        query: q ``[B, H, U, D]``. Views of ``[B, U, H * D]`` are read as they are.
        key: k ``[B, H, V, D]``.
        value: v ``[B, H, V, D]``; all three in one dtype.
        log_affinity: a ``[U, V]`` or ``[B, U, V]``, the same for all heads; ``None`` for plain attention.
        log_scale: r, shaped like ``log_affinity``; multiplies the weights after the softmax. Only the plain reference
            knows it.
        skip_empty_tiles: let the GPU kernel leave out tiles of 64 receivers and senders without an edge; always exact,
            and worth its test where many tiles are empty. Other backends need no such hint.

    Returns:
        o ``[B, H, U, D]``, in the dtype of ``value``; the compiled backends lay it out as ``[B, U, H, D]``, so that
        joining the heads copies nothing.

    Raises:
        M2MKDError: shapes, dtypes or devices are not as described above.

    Source: Rahaman et al., Neural Attentive Circuits, arXiv 2210.08031, section 2.
    """
    _check(query, key, value, log_affinity, log_scale)
    reasons = {
        "cpu": _why_not_cpu(query, log_scale),
        "triton": _why_not_triton(query, log_affinity, log_scale),
    }
    backend = select_backend("latent_attention", reasons)
    if backend == "reference":
        return latent_attention_reference(query, key, value, log_affinity, log_scale)
    if backend == "triton":
        return _LatentAttention.apply(query, key, value, log_affinity, backend, skip_empty_tiles)
    # Outside of the autograd.Function: inside, under torch.compile, a cast that changes nothing gives one tensor two
    # names among the outputs, and the gradients get lost.
    tensors = _in_full_precision(query, key, value, log_affinity)
    return _LatentAttention.apply(*tensors, backend, skip_empty_tiles).to(value.dtype)


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


def _check(query: Tensor, key: Tensor, value: Tensor, log_affinity: Tensor | None, log_scale: Tensor | None) -> None:
    if query.dim() != 4 or query.shape[-1] == 0:
        raise M2MKDError(
            f"query has shape {tuple(query.shape)}; expected [batch, heads, receivers, head_dim] with a head_dim of at "
            "least 1"
        )
    batch, heads, receivers, head_dim = query.shape
    if key.dim() != 4 or key.shape[:2] != query.shape[:2] or key.shape[-1] != head_dim:
        raise M2MKDError(
            f"key has shape {tuple(key.shape)}; for query {tuple(query.shape)} expected "
            f"[{batch}, {heads}, senders, {head_dim}]"
        )
    if value.shape != key.shape:
        raise M2MKDError(f"value has shape {tuple(value.shape)}, key {tuple(key.shape)}; they must be the same")
    edges = (receivers, key.shape[2])
    for name, tensor in (("log_affinity", log_affinity), ("log_scale", log_scale)):
        if tensor is not None and tensor.shape not in (edges, (batch, *edges)):
            raise M2MKDError(
                f"{name} has shape {tuple(tensor.shape)}; for query {tuple(query.shape)} and key {tuple(key.shape)} "
                f"expected {edges} or {(batch, *edges)}"
            )
    for name, tensor in (
        ("query", query),
        ("key", key),
        ("value", value),
        ("log_affinity", log_affinity),
        ("log_scale", log_scale),
    ):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise M2MKDError(f"{name} has dtype {tensor.dtype}; expected a floating dtype")
        if tensor.device != query.device:
            raise M2MKDError(f"{name} is on {tensor.device}, query on {query.device}; move one of them")
    if not query.dtype == key.dtype == value.dtype:
        raise M2MKDError(
            f"query, key and value have dtypes {query.dtype}, {key.dtype} and {value.dtype}; they must be the same"
        )


def _why_not_cpu(query: Tensor, log_scale: Tensor | None) -> str | None:
    return device_reason(query, "cpu") or why_missing("_C") or _scale_reason(log_scale)


def _why_not_triton(query: Tensor, log_affinity: Tensor | None, log_scale: Tensor | None) -> str | None:
    reason = triton_reason(query) or _scale_reason(log_scale)
    if reason is not None:
        return reason
    for tensor in (query, log_affinity):
        if tensor is not None and tensor.dtype not in _TRITON_DTYPES:
            return f"the kernel knows float32, bfloat16 and float16, not {tensor.dtype}"
    if query.dtype == torch.bfloat16 and query.device.type != "cuda":
        return "Triton's interpreter multiplies the bits of bfloat16, not the numbers"
    lowest, highest = _TRITON_HEAD_DIMS
    if not lowest <= query.shape[-1] <= highest:
        return f"the kernel takes heads of {lowest} to {highest} channels, not {query.shape[-1]}"
    return None


def _scale_reason(log_scale: Tensor | None) -> str | None:
    return None if log_scale is None else "the kernel knows no log_scale"


class _LatentAttention(torch.autograd.Function):
    """The kernels, with their gradient."""

    @staticmethod
    def forward(ctx, query, key, value, log_affinity, backend, skip_empty_tiles):
        tensors = (query, key, value, log_affinity)
        if backend == "triton":
            out, logsumexp = torch.ops.m2mkd_fast._latent_attention_triton_forward(*tensors, skip_empty_tiles)
        else:
            out, logsumexp = torch.ops.m2mkd_fast._latent_attention_forward(*tensors)
        ctx.save_for_backward(*tensors, out, logsumexp)
        ctx.backend, ctx.skip_empty_tiles = backend, skip_empty_tiles
        return out

    @staticmethod
    def backward(ctx, grad_out):
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[:4]  # read once: activation checkpointing asks for that
        tensors = saved[:4]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Gradients of the gradient (create_graph=True) come from plain PyTorch: the kernels have none.
            chosen = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
            found = iter(torch.autograd.grad(latent_attention_reference(*tensors), chosen, grad_out, create_graph=True))
            return *(next(found) if need else None for need in needed), None, None
        arguments = (grad_out, *saved, needed[3])
        if ctx.backend == "triton":
            *grads, grad_affinity = torch.ops.m2mkd_fast._latent_attention_triton_backward(
                *arguments, ctx.skip_empty_tiles
            )
        else:
            *grads, grad_affinity = torch.ops.m2mkd_fast._latent_attention_backward(*arguments)
        return *grads, grad_affinity if needed[3] else None, None, None


def _in_full_precision(*tensors: Tensor | None) -> list[Tensor | None]:
    """All in float64 where one of them is, else in float32."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if double else torch.float32
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _new_heads_last(tensor: Tensor) -> Tensor:
    """Empty, shaped like ``tensor`` [B, H, N, D], and [B, N, H, D] in memory."""
    batch, heads, latents, head_dim = tensor.shape
    return tensor.new_empty(batch, latents, heads, head_dim).transpose(1, 2)


def _forward_fake(query: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _new_heads_last(query), query.new_empty(query.shape[:3], dtype=dtype)


def _backward_fake(
    query: Tensor, key: Tensor, log_affinity: Tensor | None, need_affinity: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_affinity = log_affinity.new_empty(log_affinity.shape) if need_affinity else query.new_empty(0)
    return _new_heads_last(query), _new_heads_last(key), _new_heads_last(key), grad_affinity


if why_missing("_C") is None:

    @torch.library.register_fake("m2mkd_fast::_latent_attention_forward")
    def _cpu_forward_fake(query, key, value, log_affinity):
        return _forward_fake(query, query.dtype)

    @torch.library.register_fake("m2mkd_fast::_latent_attention_backward")
    def _cpu_backward_fake(grad_out, query, key, value, log_affinity, out, logsumexp, need_affinity):
        return _backward_fake(query, key, log_affinity, need_affinity)


torch.library.define(
    "m2mkd_fast::_latent_attention_triton_forward",
    "(Tensor query, Tensor key, Tensor value, Tensor? log_affinity, bool skip_empty_tiles)"
    " -> (Tensor out, Tensor logsumexp)",
)
torch.library.define(
    "m2mkd_fast::_latent_attention_triton_backward",
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? log_affinity, Tensor out, Tensor logsumexp,"
    " bool need_affinity, bool skip_empty_tiles)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_affinity)",
)


@torch.library.impl("m2mkd_fast::_latent_attention_triton_forward", ("cuda", "cpu"))
def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from m2mkd_fast.kernels import latent_attention as kernels  # here, because it imports Triton

    return kernels.forward(*args)


@torch.library.impl("m2mkd_fast::_latent_attention_triton_backward", ("cuda", "cpu"))
def _triton_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from m2mkd_fast.kernels import latent_attention as kernels

    return kernels.backward(*args)


@torch.library.register_fake("m2mkd_fast::_latent_attention_triton_forward")
def _triton_forward_fake(query, key, value, log_affinity, skip_empty_tiles):
    return _forward_fake(query, torch.float32)


@torch.library.register_fake("m2mkd_fast::_latent_attention_triton_backward")
def _triton_backward_fake(grad_out, query, key, value, log_affinity, out, logsumexp, need_affinity, skip_empty_tiles):
    return _backward_fake(query, key, log_affinity, need_affinity)
