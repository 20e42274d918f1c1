"""GEGLU followed by a per-latent scale: what lies between the two products of a modulated feed-forward layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_fast._extension import why_missing
from m2mkd_fast.backend import device_reason, select_backend, triton_reason
from m2mkd_fast.errors import M2MKDError

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def modulated_geglu(hidden: Tensor, scale: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    r"""Values times the GELU of their gates, times a scale for each latent, in one pass.

    .. math::
        y_{bnf} = s_{nf}\, h_{bnf}\, g_{bnf}\, \Phi(g_{bnf}), \qquad g_{bnf} = h_{bn,f+F}

    with the distribution function :math:`\Phi` of the standard normal distribution (GELU without approximation).

    Args:
        hidden: h ``[B, N, 2 F]``, values and then gates.
        scale: s ``[N, F]``, or ``[1, F]`` for one scale for all latents.
        dtype: of y. By default the wider of those of ``hidden`` and ``scale``. A half precision here saves the pass
            that would round y for the product that follows.

    Returns:
        y ``[B, N, F]``, differentiable with respect to both tensors.

    Raises:
        M2MKDError: shapes or dtypes are not as described above.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202; the scale is that of the modulated linear layer
    of Rahaman et al., Neural Attentive Circuits, arXiv 2210.08031.
    """
    _check(hidden, scale, dtype)
    backend = select_backend(
        "modulated_geglu", {"cpu": _why_not_cpu(hidden), "triton": _why_not_triton(hidden, scale, dtype)}
    )
    if backend == "reference":
        outputs = modulated_geglu_reference(hidden, scale)
        return outputs if dtype is None else outputs.to(dtype)
    dtype = dtype or torch.promote_types(hidden.dtype, scale.dtype)
    if backend == "triton":
        return _apply("_modulated_geglu_triton", hidden, scale, dtype)
    # The C++ kernel knows one dtype a call, float32 or float64; half precisions are widened for it. Out here, because
    # inside a function that torch.compile traces a conversion to the same dtype loses gradients (torch 2.11).
    precision = torch.float64 if torch.float64 in (hidden.dtype, scale.dtype) else torch.float32
    return _apply("_modulated_geglu", hidden.to(precision), scale.to(precision), precision).to(dtype)


def modulated_geglu_reference(hidden: Tensor, scale: Tensor) -> Tensor:
    """Plain PyTorch, any dtype."""
    values, gates = hidden.chunk(2, dim=-1)
    return values * F.gelu(gates) * scale


def _check(hidden: Tensor, scale: Tensor, dtype: torch.dtype | None) -> None:
    if hidden.dim() != 3 or hidden.shape[-1] == 0 or hidden.shape[-1] % 2:
        raise M2MKDError(
            f"hidden has shape {tuple(hidden.shape)}; expected [batch, latents, 2 * width] with a width of at least 1"
        )
    latents, width = hidden.shape[1], hidden.shape[2] // 2
    if scale.dim() != 2 or scale.shape[0] not in (1, latents) or scale.shape[1] != width:
        raise M2MKDError(
            f"scale has shape {tuple(scale.shape)}; for hidden {tuple(hidden.shape)} expected [{latents}, {width}] or "
            f"[1, {width}]"
        )
    for name, tensor in (("hidden", hidden), ("scale", scale)):
        if not tensor.is_floating_point():
            raise M2MKDError(f"{name} has dtype {tensor.dtype}; expected a floating dtype")
    if scale.device != hidden.device:
        raise M2MKDError(f"scale is on {scale.device}, hidden on {hidden.device}; move one of them")
    if dtype is not None and not dtype.is_floating_point:
        raise M2MKDError(f"dtype is {dtype}; expected a floating dtype")


def _why_not_cpu(hidden: Tensor) -> str | None:
    return device_reason(hidden, "cpu") or why_missing("_C")


def _why_not_triton(hidden: Tensor, scale: Tensor, dtype: torch.dtype | None) -> str | None:
    reason = triton_reason(hidden)
    for used in (hidden.dtype, scale.dtype, dtype or hidden.dtype):
        if reason is None and used not in _TRITON_DTYPES:
            reason = f"the kernel knows float32, bfloat16 and float16, not {used}"
    return reason


def _apply(op: str, hidden: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.is_grad_enabled():
        return _ModulatedGEGLU.apply(hidden, scale, dtype, op)
    return _forward(op, hidden, scale, dtype)


def _forward(op: str, hidden: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if op == "_modulated_geglu":
        return torch.ops.m2mkd_fast._modulated_geglu_forward(hidden, scale)
    return torch.ops.m2mkd_fast._modulated_geglu_triton_forward(hidden, scale, dtype)


class _ModulatedGEGLU(torch.autograd.Function):
    """The kernels, with their gradient."""

    @staticmethod
    def forward(ctx, hidden, scale, dtype, op):
        ctx.save_for_backward(hidden, scale)
        ctx.dtype, ctx.op = dtype, op
        return _forward(op, hidden, scale, dtype)

    @staticmethod
    def backward(ctx, grad_outputs):
        hidden, scale = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Gradients of the gradient (create_graph=True) come from plain PyTorch: the kernel has none.
            outputs = modulated_geglu_reference(hidden, scale).to(ctx.dtype)
            needed = [tensor for tensor, need in zip((hidden, scale), ctx.needs_input_grad, strict=False) if need]
            found = iter(torch.autograd.grad(outputs, needed, grad_outputs, create_graph=True))
            return *(next(found) if need else None for need in ctx.needs_input_grad[:2]), None, None
        backward = getattr(torch.ops.m2mkd_fast, f"{ctx.op}_backward")
        return *backward(grad_outputs, hidden, scale), None, None


torch.library.define(
    "m2mkd_fast::_modulated_geglu_triton_forward", "(Tensor hidden, Tensor scale, ScalarType dtype) -> Tensor"
)
torch.library.define(
    "m2mkd_fast::_modulated_geglu_triton_backward",
    "(Tensor grad_outputs, Tensor hidden, Tensor scale) -> (Tensor grad_hidden, Tensor grad_scale)",
)


@torch.library.impl("m2mkd_fast::_modulated_geglu_triton_forward", ("cuda", "cpu"))
def _triton_forward(*args: Any) -> Tensor:
    from m2mkd_fast.kernels import modulated_geglu as kernels  # here, because it imports Triton

    return kernels.forward(*args)


@torch.library.impl("m2mkd_fast::_modulated_geglu_triton_backward", ("cuda", "cpu"))
def _triton_backward(*args: Any) -> tuple[Tensor, Tensor]:
    from m2mkd_fast.kernels import modulated_geglu as kernels

    return kernels.backward(*args)


def _forward_fake(hidden, scale, dtype=None):
    """Of both kernels: the compiled one has no ``dtype`` and computes in that of its inputs."""
    return hidden.new_empty((*hidden.shape[:2], hidden.shape[2] // 2), dtype=dtype)


def _backward_fake(grad_outputs, hidden, scale):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (hidden, scale))


torch.library.register_fake("m2mkd_fast::_modulated_geglu_triton_forward", _forward_fake)
torch.library.register_fake("m2mkd_fast::_modulated_geglu_triton_backward", _backward_fake)
if why_missing("_C") is None:
    torch.library.register_fake("m2mkd_fast::_modulated_geglu_forward", _forward_fake)
    torch.library.register_fake("m2mkd_fast::_modulated_geglu_backward", _backward_fake)
