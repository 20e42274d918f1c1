"""Layer norm followed by one or several per-latent scales: the prologue of every modulated projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_fast._extension import why_missing
from m2mkd_fast.autocast import autocast_dtype
from m2mkd_fast.backend import device_reason, select_backend, triton_reason
from m2mkd_fast.errors import M2MKDError

_MOST_SCALES = 8
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_WIDTH, _TRITON_PRODUCT = 4096, 8192  # what fits into the registers of a program


def modulated_norm(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[Tensor],
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    r"""Normalise once, scale M times.

    .. math::
        y_{mbnc} = s_{mnc} \Big(\gamma_c \frac{x_{bnc} - \mu_{bn}}{\sqrt{\sigma^2_{bn} + \epsilon}} + \beta_c\Big)

    Keys and values read the same normalised senders with two different scales; one pass over ``inputs`` serves both.

    Args:
        inputs: x ``[B, N, C]``.
        weight: gamma ``[C]``.
        bias: beta ``[C]``.
        scales: M tensors s_m, at least one, all ``[N, C]``, or all ``[1, C]`` where one scale serves all latents.
        eps: added to the variance.
        dtype: of y. By default the wider of the layer norm's (float32 under autocast) and that of ``scales``. A half
            precision here saves the pass that would round y for the product that follows.

    Returns:
        M tensors y_m ``[B, N, C]``, differentiable with respect to all tensors.

    Raises:
        M2MKDError: shapes or dtypes are not as described above.

    Source: the modulated linear layer of Rahaman et al., Neural Attentive Circuits, arXiv 2210.08031.
    """
    scales = list(scales)
    _check(inputs, weight, bias, scales, dtype)
    backend = select_backend(
        "modulated_norm",
        {"cpu": _why_not_cpu(inputs, scales), "triton": _why_not_triton(inputs, weight, bias, scales, dtype)},
    )
    if backend == "reference":
        outputs = modulated_norm_reference(inputs, weight, bias, scales, eps)
        return outputs if dtype is None else [output.to(dtype) for output in outputs]
    dtype = dtype or _natural_dtype(inputs, scales)
    if backend == "triton":
        return _apply("_modulated_norm_triton", inputs, weight, bias, scales, eps, dtype)
    # The C++ kernel knows one dtype a call, float32 or float64; half precisions are widened for it. Out here, because
    # inside a function that torch.compile traces a conversion to the same dtype loses gradients (torch 2.11).
    tensors = (inputs, weight, bias, *scales)
    precision = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    inputs, weight, bias, *scales = (tensor.to(precision) for tensor in tensors)
    outputs = _apply("_modulated_norm", inputs, weight, bias, scales, eps, precision)
    return [output.to(dtype) for output in outputs]


def modulated_norm_reference(
    inputs: Tensor, weight: Tensor, bias: Tensor, scales: Sequence[Tensor], eps: float = 1e-5
) -> list[Tensor]:
    """Plain PyTorch, any dtype."""
    normalized = F.layer_norm(inputs, inputs.shape[-1:], weight, bias, eps)
    return [normalized * scale for scale in scales]


def _natural_dtype(inputs: Tensor, scales: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the reference's result."""
    normalized = inputs.dtype if autocast_dtype(inputs) is None else torch.float32
    return torch.promote_types(normalized, scales[0].dtype)


def _check(inputs: Tensor, weight: Tensor, bias: Tensor, scales: Sequence[Tensor], dtype: torch.dtype | None) -> None:
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
    if not scales:
        raise M2MKDError("scales is empty; pass at least one")
    for number, scale in enumerate(scales):
        if scale.dim() != 2 or scale.shape[0] not in (1, latents) or scale.shape[1] != width:
            raise M2MKDError(
                f"scales[{number}] has shape {tuple(scale.shape)}; for inputs {tuple(inputs.shape)} expected "
                f"[{latents}, {width}] or [1, {width}]"
            )
        if scale.shape != scales[0].shape or scale.dtype != scales[0].dtype:
            raise M2MKDError(
                f"scales[{number}] is {scale.dtype} {tuple(scale.shape)}, scales[0] {scales[0].dtype} "
                f"{tuple(scales[0].shape)}; expand or convert one of them"
            )
    named = [("inputs", inputs), ("weight", weight), ("bias", bias)]
    for name, tensor in (*named, *((f"scales[{number}]", scale) for number, scale in enumerate(scales))):
        if not tensor.is_floating_point():
            raise M2MKDError(f"{name} has dtype {tensor.dtype}; expected a floating dtype")
        if tensor.device != inputs.device:
            raise M2MKDError(f"{name} is on {tensor.device}, inputs on {inputs.device}; move one of them")
    if dtype is not None and not dtype.is_floating_point:
        raise M2MKDError(f"dtype is {dtype}; expected a floating dtype")


def _why_not_cpu(inputs: Tensor, scales: Sequence[Tensor]) -> str | None:
    reason = device_reason(inputs, "cpu") or why_missing("_C")
    if reason is None and len(scales) > _MOST_SCALES:
        reason = f"the kernel takes up to {_MOST_SCALES} scales, not {len(scales)}"
    return reason


def _why_not_triton(
    inputs: Tensor, weight: Tensor, bias: Tensor, scales: Sequence[Tensor], dtype: torch.dtype | None
) -> str | None:
    reason = triton_reason(inputs)
    if reason is not None:
        return reason
    for used in (inputs.dtype, weight.dtype, bias.dtype, scales[0].dtype, dtype or inputs.dtype):
        if used not in _TRITON_DTYPES:
            return f"the kernel knows float32, bfloat16 and float16, not {used}"
    if weight.dtype != bias.dtype:
        return f"the kernel needs weight and bias in one dtype, not {weight.dtype} and {bias.dtype}"
    number, width = len(scales), inputs.shape[-1]
    if number > _MOST_SCALES or width > _TRITON_WIDTH or number * width > _TRITON_PRODUCT:
        return (
            f"the kernel takes up to {_MOST_SCALES} scales of {_TRITON_WIDTH} channels, {_TRITON_PRODUCT} numbers in "
            f"all, not {number} of {width}"
        )
    return None


def _apply(
    op: str, inputs: Tensor, weight: Tensor, bias: Tensor, scales: Sequence[Tensor], eps: float, dtype: torch.dtype
) -> list[Tensor]:
    if not torch.is_grad_enabled():
        return _forward(op, inputs, weight, bias, scales, eps, dtype)[0]
    # Filled up to a number that is not that of forward's parameters: where both are the same (with two scales, they
    # would be), torch.compile takes the context for missing (torch 2.11).
    filling = [None] * (_MOST_SCALES - len(scales))
    return list(_ModulatedNorm.apply(op, eps, dtype, inputs, weight, bias, *scales, *filling))


def _forward(op, inputs, weight, bias, scales, eps, dtype):
    if op == "_modulated_norm":
        return torch.ops.m2mkd_fast._modulated_norm_forward(inputs, weight, bias, scales, eps)
    return torch.ops.m2mkd_fast._modulated_norm_triton_forward(inputs, weight, bias, scales, eps, dtype)


class _ModulatedNorm(torch.autograd.Function):
    """The kernels, with their gradient."""

    @staticmethod
    def forward(ctx, op, eps, dtype, inputs, weight, bias, *filled_scales):
        scales = [scale for scale in filled_scales if scale is not None]
        outputs, mean, rstd = _forward(op, inputs, weight, bias, scales, eps, dtype)
        ctx.save_for_backward(mean, rstd, inputs, weight, bias, *scales)
        ctx.eps, ctx.dtype, ctx.op = eps, dtype, op
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grad_outputs):
        mean, rstd, *tensors = ctx.saved_tensors
        inputs, weight, bias, *scales = tensors
        filling = [None] * (_MOST_SCALES - len(scales))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Gradients of the gradient (create_graph=True) come from plain PyTorch: the kernel has none.
            outputs = [one.to(ctx.dtype) for one in modulated_norm_reference(inputs, weight, bias, scales, ctx.eps)]
            need = ctx.needs_input_grad[3 : 3 + len(tensors)]
            needed = [tensor for tensor, asked in zip(tensors, need, strict=True) if asked]
            found = iter(torch.autograd.grad(outputs, needed, grad_outputs, create_graph=True))
            return None, None, None, *(next(found) if asked else None for asked in need), *filling
        backward = getattr(torch.ops.m2mkd_fast, f"{ctx.op}_backward")
        grad_inputs, grad_affine, grad_scales = backward(grad_outputs, inputs, weight, bias, scales, mean, rstd)
        return None, None, None, grad_inputs, *grad_affine.unbind(), *grad_scales, *filling


torch.library.define(
    "m2mkd_fast::_modulated_norm_triton_forward",
    "(Tensor inputs, Tensor weight, Tensor bias, Tensor[] scales, float eps, ScalarType dtype)"
    " -> (Tensor[] outputs, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "m2mkd_fast::_modulated_norm_triton_backward",
    "(Tensor[] grad_outputs, Tensor inputs, Tensor weight, Tensor bias, Tensor[] scales, Tensor mean, Tensor rstd)"
    " -> (Tensor grad_inputs, Tensor grad_affine, Tensor[] grad_scales)",
)


@torch.library.impl("m2mkd_fast::_modulated_norm_triton_forward", ("cuda", "cpu"))
def _triton_forward(*args: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    from m2mkd_fast.kernels import modulated_norm as kernels  # here, because it imports Triton

    return kernels.forward(*args)


@torch.library.impl("m2mkd_fast::_modulated_norm_triton_backward", ("cuda", "cpu"))
def _triton_backward(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    from m2mkd_fast.kernels import modulated_norm as kernels

    return kernels.backward(*args)


def _forward_fake(inputs, weight, bias, scales, eps, dtype=None):
    """Of both kernels: the compiled one has no ``dtype`` and computes in that of its inputs."""
    outputs = [inputs.new_empty(inputs.shape, dtype=dtype) for _ in scales]
    statistic = inputs.new_empty(inputs.shape[:2], dtype=inputs.dtype if dtype is None else torch.float32)
    return outputs, statistic, torch.empty_like(statistic)


def _backward_fake(grad_outputs, inputs, weight, bias, scales, mean, rstd):
    return (
        torch.empty_like(inputs, memory_format=torch.contiguous_format),
        weight.new_empty((2, weight.shape[0])),
        [torch.empty_like(scale, memory_format=torch.contiguous_format) for scale in scales],
    )


torch.library.register_fake("m2mkd_fast::_modulated_norm_triton_forward", _forward_fake)
torch.library.register_fake("m2mkd_fast::_modulated_norm_triton_backward", _backward_fake)
if why_missing("_C") is None:
    torch.library.register_fake("m2mkd_fast::_modulated_norm_forward", _forward_fake)
    torch.library.register_fake("m2mkd_fast::_modulated_norm_backward", _backward_fake)
