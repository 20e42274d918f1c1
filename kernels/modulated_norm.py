r"""Triton kernels of :func:`m2mkd_fast.ops.modulated_norm.modulated_norm`.

With :math:`\hat x = (x - \mu) / \sqrt{\sigma^2 + \epsilon}`, the forward kernel writes
:math:`y_m = s_m (\gamma \hat x + \beta)`, :math:`\mu` and :math:`1/\sqrt{\sigma^2 + \epsilon}`; the backward kernel,
from :math:`g_m = \partial L / \partial y_m` and with :math:`d = \sum_m s_m g_m`,

.. math::
    \partial x &= \tfrac{1}{\sqrt{\sigma^2 + \epsilon}}
        \big(\gamma d - \overline{\gamma d} - \hat x\, \overline{\gamma d\, \hat x}\big) &
    \partial s_m &= \sum_b g_m (\gamma \hat x + \beta) \\
    \partial \gamma &= \sum_{b,n} d\, \hat x & \partial \beta &= \sum_{b,n} d

where a bar is the mean over channels. A program holds the scales of one latent and walks through a chunk of the batch,
one row at a time, all of it in registers: scales are read once per chunk, and their gradients summed without leaving
the program. Sums over programs go through buffers and are taken in a fixed order, so results repeat bit for bit.
Everything is computed in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Enough programs to fill a large GPU, so few that the buffers of partial sums stay small beside the inputs. Constants,
# not properties of the device: the order of summation, and with it the last bit, is the same everywhere.
_PROGRAMS = 2048
_LONGEST_CHUNK = 64
_SUM_ROWS, _SUM_COLUMNS = 64, 32


@triton.jit
def forward_kernel(
    inputs,  # [batch, latents, width]
    weight,  # [width]
    bias,  # [width]
    scales,  # SCALES times [latents, width]
    outputs,  # SCALES times [batch, latents, width]
    mean,  # [batch, latents]
    rstd,  # [batch, latents]
    batch,
    latents,
    width,
    eps,
    SCALES: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    batch, latents = tl.cast(batch, tl.int64), tl.cast(latents, tl.int64)  # products of sizes pass 32 bits
    program = tl.program_id(0)
    latent, chunk = program % latents, program // latents
    channel = tl.arange(0, WIDTH_BLOCK)
    inside = channel < width
    gamma = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    beta = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    scale = ()
    for m in tl.static_range(SCALES):
        at = scales[m] + latent * width + channel
        scale += (tl.load(at, mask=inside, other=0.0).to(tl.float32),)
    for step in range(CHUNK):
        image = chunk * CHUNK + step
        valid, row = image < batch, image * latents + latent
        x = tl.load(inputs + row * width + channel, mask=inside & valid, other=0.0).to(tl.float32)
        mu = tl.sum(x, axis=0) / width
        centered = tl.where(inside, x - mu, 0.0)
        inverse = tl.rsqrt(tl.sum(centered * centered, axis=0) / width + eps)
        normalized = centered * inverse * gamma + beta
        for m in tl.static_range(SCALES):
            tl.store(outputs[m] + row * width + channel, scale[m] * normalized, mask=inside & valid)
        tl.store(mean + row, mu, mask=valid)
        tl.store(rstd + row, inverse, mask=valid)


@triton.jit
def backward_kernel(
    grad_outputs,  # SCALES times [batch, latents, width]
    inputs,  # [batch, latents, width]
    weight,  # [width]
    bias,  # [width]
    scales,  # SCALES times [latents, width]
    mean,  # [batch, latents]
    rstd,  # [batch, latents]
    grad_inputs,  # [batch, latents, width]
    grad_scales,  # SCALES times [chunks, latents, width]
    grad_affine,  # [chunks, latents, 2, width], float32
    batch,
    latents,
    width,
    SCALES: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    batch, latents = tl.cast(batch, tl.int64), tl.cast(latents, tl.int64)  # products of sizes pass 32 bits
    program = tl.program_id(0)
    latent, chunk = program % latents, program // latents
    channel = tl.arange(0, WIDTH_BLOCK)
    inside = channel < width
    gamma = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    beta = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    scale = ()
    for m in tl.static_range(SCALES):
        at = scales[m] + latent * width + channel
        scale += (tl.load(at, mask=inside, other=0.0).to(tl.float32),)
    gamma_sum = tl.zeros([WIDTH_BLOCK], dtype=tl.float32)
    beta_sum = tl.zeros([WIDTH_BLOCK], dtype=tl.float32)
    scale_sum = ()
    for _ in tl.static_range(SCALES):
        scale_sum += (gamma_sum,)
    for step in range(CHUNK):
        image = chunk * CHUNK + step
        valid, row = image < batch, image * latents + latent
        # Beyond the width and beyond the batch the gradient reads as zero, and so adds nothing to any sum.
        x = tl.load(inputs + row * width + channel, mask=inside & valid, other=0.0).to(tl.float32)
        mu = tl.load(mean + row, mask=valid, other=0.0)
        inverse = tl.load(rstd + row, mask=valid, other=0.0)
        normalized = (x - mu) * inverse
        affined = normalized * gamma + beta
        grad_affined = tl.zeros([WIDTH_BLOCK], dtype=tl.float32)
        sums = ()
        for m in tl.static_range(SCALES):
            grad = tl.load(grad_outputs[m] + row * width + channel, mask=inside & valid, other=0.0).to(tl.float32)
            grad_affined += grad * scale[m]
            sums += (scale_sum[m] + grad * affined,)
        scale_sum = sums
        gamma_sum += grad_affined * normalized
        beta_sum += grad_affined
        grad_normalized = grad_affined * gamma
        along_mean = tl.sum(grad_normalized, axis=0) / width
        along_x = tl.sum(grad_normalized * normalized, axis=0) / width
        grad_x = inverse * (grad_normalized - along_mean - normalized * along_x)
        tl.store(grad_inputs + row * width + channel, grad_x, mask=inside & valid)
    for m in tl.static_range(SCALES):
        tl.store(grad_scales[m] + (chunk * latents + latent) * width + channel, scale_sum[m], mask=inside)
    tl.store(grad_affine + 2 * program * width + channel, gamma_sum, mask=inside)
    tl.store(grad_affine + (2 * program + 1) * width + channel, beta_sum, mask=inside)


@triton.jit
def sum_rows_kernel(
    partial,  # [rows, columns], float32
    total,  # [columns]
    rows,
    columns,
    ROWS_BLOCK: tl.constexpr,
    COLUMNS_BLOCK: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * COLUMNS_BLOCK + tl.arange(0, COLUMNS_BLOCK)[None, :]
    sums = tl.zeros([ROWS_BLOCK, COLUMNS_BLOCK], dtype=tl.float32)
    row = tl.arange(0, ROWS_BLOCK)[:, None].to(tl.int64)
    first = 0
    while first < rows:  # not `range`: Triton's interpreter cannot count to a number known at run time
        inside = (first + row < rows) & (column < columns)
        sums += tl.load(partial + (first + row) * columns + column, mask=inside, other=0.0)
        first += ROWS_BLOCK
    tl.store(total + column, tl.sum(sums, axis=0)[None, :], mask=column < columns)


def chunk_of(batch: int, latents: int) -> int:
    """Rows a program walks through: a power of two, so that few kernels are compiled for many batch sizes."""
    wanted = triton.cdiv(batch * latents, _PROGRAMS)
    return min(triton.next_power_of_2(wanted), triton.next_power_of_2(batch), _LONGEST_CHUNK)


def blocks_of(scales: int, width: int) -> dict[str, int]:
    """The compile-time sizes of the forward and the backward kernel that follow from the operator's.

    Four channels to a thread: one load of 16 bytes in float32, one of 8 in half precisions. One number for all dtypes
    keeps rows of different ones in the same threads.
    """
    width_block = triton.next_power_of_2(width)
    return {"SCALES": scales, "WIDTH_BLOCK": width_block, "num_warps": min(max(width_block // 128, 1), 16)}


def forward(
    inputs: Tensor, weight: Tensor, bias: Tensor, scales: list[Tensor], eps: float, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor]:
    """M times y ``[B, N, C]`` in ``dtype``; mean and reciprocal standard deviation ``[B, N]`` in float32."""
    outputs = [inputs.new_empty(inputs.shape, dtype=dtype) for _ in scales]
    mean = inputs.new_empty(inputs.shape[:2], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if inputs.numel():
        batch, latents, width = _sizes(inputs, scales)
        chunk = chunk_of(batch, latents)
        with torch.cuda.device_of(inputs):
            forward_kernel[(latents * triton.cdiv(batch, chunk),)](
                inputs.contiguous(),
                weight.contiguous(),
                bias.contiguous(),
                _dense(scales),
                tuple(outputs),
                mean,
                rstd,
                batch,
                latents,
                width,
                eps,
                CHUNK=chunk,
                **blocks_of(len(scales), width),
            )
    return outputs, mean, rstd


def backward(
    grad_outputs: list[Tensor],
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: list[Tensor],
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of the inputs, of weight and bias as ``[2, C]``, and of the scales, each in the dtype of its tensor."""
    grad_inputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    grad_affine = weight.new_empty((2, weight.shape[0]))
    grad_scales = [torch.empty_like(scale, memory_format=torch.contiguous_format) for scale in scales]
    if inputs.numel() == 0:
        for zero in (grad_affine, *grad_scales):
            zero.zero_()
        return grad_inputs, grad_affine, grad_scales
    batch, latents, width = _sizes(inputs, scales)
    chunk = chunk_of(batch, latents)
    chunks = triton.cdiv(batch, chunk)
    affine_parts = inputs.new_empty((chunks * latents, 2, width), dtype=torch.float32)
    scales_parts = grad_scales
    if chunks > 1:
        scales_parts = [scale.new_empty((chunks, *scale.shape), dtype=torch.float32) for scale in scales]
    with torch.cuda.device_of(inputs):
        backward_kernel[(latents * chunks,)](
            _dense(grad_outputs),
            inputs.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            _dense(scales),
            mean,
            rstd,
            grad_inputs,
            tuple(scales_parts),
            affine_parts,
            batch,
            latents,
            width,
            CHUNK=chunk,
            **blocks_of(len(scales), width),
        )
        sum_rows(affine_parts, grad_affine)
        if chunks > 1:
            for parts, total in zip(scales_parts, grad_scales, strict=True):
                sum_rows(parts, total)
    return grad_inputs, grad_affine, grad_scales


def _sizes(inputs: Tensor, scales: list[Tensor]) -> tuple[int, int, int]:
    """Batch, latents and width for the kernels. Rows that share one scale are one latent's."""
    batch, latents, width = inputs.shape
    return (batch * latents, 1, width) if scales[0].shape[0] == 1 else (batch, latents, width)


def _dense(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def sum_rows(partial: Tensor, total: Tensor) -> None:
    """The sum of float32 ``partial`` over its first dimension, in a fixed order, in the dtype of ``total``."""
    grid = (triton.cdiv(total.numel(), _SUM_COLUMNS),)
    sum_rows_kernel[grid](
        partial,
        total,
        partial.shape[0],
        total.numel(),
        ROWS_BLOCK=_SUM_ROWS,
        COLUMNS_BLOCK=_SUM_COLUMNS,
    )
