"""Layer norm followed by one or several per-latent scales: the prologue of every modulated projection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_fast.backend import select_backend, triton_reason
from m2mkd_fast.errors import M2MKDError

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_SCALES, _TRITON_WIDTH, _TRITON_PRODUCT = 8, 4096, 8192  # what fits into the registers of a program


def modulated_norm(
    inputs: Tensor, weight: Tensor, bias: Tensor, scales: Tensor, eps: float = 1e-5, *, dtype: torch.dtype | None = None
) -> Tensor:
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
        dtype: of y. By default the wider of the layer norm's (float32 under autocast) and that of ``scales``. A half
            precision here saves the pass that would round y for the product that follows.

    Returns:
        y ``[M, B, N, C]``, differentiable with respect to all four tensors.

    Raises:
        M2MKDError: shapes or dtypes are not as described above.

    Source: the modulated linear layer of Rahaman et al., Neural Attentive Circuits, arXiv 2210.08031.
    """
    _check(inputs, weight, bias, scales, dtype)
    backend = select_backend("modulated_norm", {"triton": _why_not_triton(inputs, weight, bias, scales, dtype)})
    if backend == "triton":
        return _ModulatedNorm.apply(inputs, weight, bias, scales, eps, dtype or _natural_dtype(inputs, scales))
    outputs = modulated_norm_reference(inputs, weight, bias, scales, eps)
    return outputs if dtype is None else outputs.to(dtype)


def modulated_norm_reference(inputs: Tensor, weight: Tensor, bias: Tensor, scales: Tensor, eps: float = 1e-5) -> Tensor:
    """Plain PyTorch, any dtype."""
    return F.layer_norm(inputs, inputs.shape[-1:], weight, bias, eps) * scales.unsqueeze(1)


def _natural_dtype(inputs: Tensor, scales: Tensor) -> torch.dtype:
    """The dtype of the reference's result."""
    normalized = torch.float32 if torch.is_autocast_enabled(inputs.device.type) else inputs.dtype
    return torch.promote_types(normalized, scales.dtype)


def _check(inputs: Tensor, weight: Tensor, bias: Tensor, scales: Tensor, dtype: torch.dtype | None) -> None:
    if inputs.dim() != 3 or inputs.shape[-1] == 0:
        raise M2MKDError(
            f"inputs has shape {tuple(inputs.shape)}; expected [batch, latents, width] with a width of at least 1"
        )
    _, latents, width = inputs.shape
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != (width,):
            raise M2MKDError(
                f"{name} has shape {tuple(tensor.shape)}, expected ({width},) for inputs {tuple(inputs.shape)}"
            )
    if scales.dim() != 3 or scales.shape[0] == 0 or scales.shape[1] not in (1, latents) or scales.shape[2] != width:
        raise M2MKDError(
            f"scales has shape {tuple(scales.shape)}; for inputs {tuple(inputs.shape)} expected "
            f"[M, {latents}, {width}] or [M, 1, {width}], with M at least 1"
        )
    for name, tensor in (("inputs", inputs), ("weight", weight), ("bias", bias), ("scales", scales)):
        if not tensor.is_floating_point():
            raise M2MKDError(f"{name} has dtype {tensor.dtype}; expected a floating dtype")
        if tensor.device != inputs.device:
            raise M2MKDError(f"{name} is on {tensor.device}, inputs on {inputs.device}; move one of them")
    if dtype is not None and not dtype.is_floating_point:
        raise M2MKDError(f"dtype is {dtype}; expected a floating dtype")


def _why_not_triton(
    inputs: Tensor, weight: Tensor, bias: Tensor, scales: Tensor, dtype: torch.dtype | None
) -> str | None:
    reason = triton_reason(inputs)
    if reason is not None:
        return reason
    for used in (inputs.dtype, weight.dtype, bias.dtype, scales.dtype, dtype or inputs.dtype):
        if used not in _TRITON_DTYPES:
            return f"the kernel knows float32, bfloat16 and float16, not {used}"
    if weight.dtype != bias.dtype:
        return f"the kernel needs weight and bias in one dtype, not {weight.dtype} and {bias.dtype}"
    number, width = scales.shape[0], inputs.shape[-1]
    if number > _TRITON_SCALES or width > _TRITON_WIDTH or number * width > _TRITON_PRODUCT:
        return (
            f"the kernel takes up to {_TRITON_SCALES} scales of {_TRITON_WIDTH} channels, {_TRITON_PRODUCT} numbers in "
            f"all, not {number} of {width}"
        )
    return None


class _ModulatedNorm(torch.autograd.Function):
    """The kernels, with their gradient."""

    @staticmethod
    def forward(ctx, inputs, weight, bias, scales, eps, dtype):
        outputs, mean, rstd = torch.ops.m2mkd_fast._modulated_norm_triton_forward(
            inputs, weight, bias, scales, eps, dtype
        )
        ctx.save_for_backward(inputs, weight, bias, scales, mean, rstd)
        ctx.eps, ctx.dtype = eps, dtype
        return outputs

    @staticmethod
    def backward(ctx, grad_outputs):
        *tensors, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Gradients of the gradient (create_graph=True) come from plain PyTorch: the kernel has none.
            outputs = modulated_norm_reference(*tensors, ctx.eps).to(ctx.dtype)
            needed = [tensor for tensor, need in zip(tensors, ctx.needs_input_grad, strict=False) if need]
            found = iter(torch.autograd.grad(outputs, needed, grad_outputs, create_graph=True))
            return *(next(found) if need else None for need in ctx.needs_input_grad[:4]), None, None
        grad_inputs, grad_affine, grad_scales = torch.ops.m2mkd_fast._modulated_norm_triton_backward(
            grad_outputs, *tensors, mean, rstd
        )
        return grad_inputs, *grad_affine.unbind(), grad_scales, None, None


torch.library.define(
    "m2mkd_fast::_modulated_norm_triton_forward",
    "(Tensor inputs, Tensor weight, Tensor bias, Tensor scales, float eps, ScalarType dtype)"
    " -> (Tensor outputs, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "m2mkd_fast::_modulated_norm_triton_backward",
    "(Tensor grad_outputs, Tensor inputs, Tensor weight, Tensor bias, Tensor scales, Tensor mean, Tensor rstd)"
    " -> (Tensor grad_inputs, Tensor grad_affine, Tensor grad_scales)",
)


@torch.library.impl("m2mkd_fast::_modulated_norm_triton_forward", ("cuda", "cpu"))
def _triton_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from m2mkd_fast.kernels import modulated_norm as kernels  # here, because it imports Triton

    return kernels.forward(*args)


@torch.library.impl("m2mkd_fast::_modulated_norm_triton_backward", ("cuda", "cpu"))
def _triton_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from m2mkd_fast.kernels import modulated_norm as kernels

    return kernels.backward(*args)


@torch.library.register_fake("m2mkd_fast::_modulated_norm_triton_forward")
def _forward_fake(inputs, weight, bias, scales, eps, dtype):
    statistic = inputs.new_empty(inputs.shape[:2], dtype=torch.float32)
    return inputs.new_empty((scales.shape[0], *inputs.shape), dtype=dtype), statistic, torch.empty_like(statistic)


@torch.library.register_fake("m2mkd_fast::_modulated_norm_triton_backward")
def _backward_fake(grad_outputs, inputs, weight, bias, scales, mean, rstd):
    return (
        torch.empty_like(inputs, memory_format=torch.contiguous_format),
        weight.new_empty((2, weight.shape[0])),
        torch.empty_like(scales, memory_format=torch.contiguous_format),
    )
