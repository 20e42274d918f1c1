r"""Triton kernels of :func:`m2mkd_fast.ops.modulated_geglu.modulated_geglu`.

With values :math:`h`, gates :math:`g` and the scale :math:`s` of their latent, the forward kernel writes
:math:`y = s\, h\, g\, \Phi(g)`; the backward kernel, from :math:`d = \partial L / \partial y`,

.. math::
    \partial h &= d\, s\, g\, \Phi(g) &
    \partial g &= d\, s\, h\, \big(\Phi(g) + g\, \varphi(g)\big) &
    \partial s &= \sum_b d\, h\, g\, \Phi(g)

with the standard normal distribution's function :math:`\Phi` and density :math:`\varphi(g) = e^{-g^2/2} / \sqrt{2\pi}`.
Its tail :math:`\Phi(-t)`, :math:`t = |g|`, is :math:`e^{-t^2/2} / (t + 3)` times a factor between 0.4 and 1.5, which a
polynomial gives with a relative error of 8e-9: one exponential serves the distribution and its density.

A program holds the scale of one latent for a block of channels and walks through a chunk of the batch; the gradient of
the scale is summed without leaving the program, sums over programs are taken in a fixed order, so results repeat bit
for bit. Everything is computed in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2mkd_fast.kernels.modulated_norm import sum_rows

# As for modulated_norm: constants, so that the order of summation is the same on every device.
_PROGRAMS = 4096
_LONGEST_CHUNK = 64
_WIDTH_BLOCK = 256  # divides the published widths 768 and 512; four channels to a thread
_NUM_WARPS = 2


@triton.jit
def normal_distribution(x):
    """The probability of less than x, and exp(-x^2 / 2)."""
    t = tl.abs(x)
    e = tl.exp(-0.5 * t * t)
    inverse = 1.0 / (t + 3.0)
    w = 1.0 - 6.0 * inverse
    factor = -3.082184935e-4 * w - 9.736378311e-4
    factor = factor * w + 1.071683814e-3
    factor = factor * w + 6.961703534e-3
    factor = factor * w - 1.047172084e-2
    factor = factor * w - 4.726237353e-2
    factor = factor * w + 2.300182744e-1
    factor = factor * w - 5.093319989e-1
    factor = factor * w + 7.290836849e-1
    tail = e * (inverse * factor)
    return tl.where(x > 0.0, 1.0 - tail, tail), e


@triton.jit
def forward_kernel(
    hidden,  # [batch, latents, 2, width]
    scale,  # [latents, width]
    outputs,  # [batch, latents, width]
    batch,
    latents,
    width,
    WIDTH_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    batch, latents = tl.cast(batch, tl.int64), tl.cast(latents, tl.int64)  # products of sizes pass 32 bits
    latent, chunk = tl.program_id(0) % latents, tl.program_id(0) // latents
    channel = tl.program_id(1) * WIDTH_BLOCK + tl.arange(0, WIDTH_BLOCK)
    inside = channel < width
    s = tl.load(scale + latent * width + channel, mask=inside, other=0.0).to(tl.float32)
    for step in range(CHUNK):
        image = chunk * CHUNK + step
        valid, row = inside & (image < batch), image * latents + latent
        value = tl.load(hidden + 2 * row * width + channel, mask=valid, other=0.0).to(tl.float32)
        gate = tl.load(hidden + (2 * row + 1) * width + channel, mask=valid, other=0.0).to(tl.float32)
        cdf, _ = normal_distribution(gate)
        tl.store(outputs + row * width + channel, value * (gate * cdf) * s, mask=valid)


@triton.jit
def backward_kernel(
    grad_outputs,  # [batch, latents, width]
    hidden,  # [batch, latents, 2, width]
    scale,  # [latents, width]
    grad_hidden,  # [batch, latents, 2, width]
    grad_scale,  # [chunks, latents, width]
    batch,
    latents,
    width,
    WIDTH_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    batch, latents = tl.cast(batch, tl.int64), tl.cast(latents, tl.int64)  # products of sizes pass 32 bits
    latent, chunk = tl.program_id(0) % latents, tl.program_id(0) // latents
    channel = tl.program_id(1) * WIDTH_BLOCK + tl.arange(0, WIDTH_BLOCK)
    inside = channel < width
    s = tl.load(scale + latent * width + channel, mask=inside, other=0.0).to(tl.float32)
    scale_sum = tl.zeros([WIDTH_BLOCK], dtype=tl.float32)
    for step in range(CHUNK):
        image = chunk * CHUNK + step
        valid, row = inside & (image < batch), image * latents + latent
        value = tl.load(hidden + 2 * row * width + channel, mask=valid, other=0.0).to(tl.float32)
        gate = tl.load(hidden + (2 * row + 1) * width + channel, mask=valid, other=0.0).to(tl.float32)
        grad_output = tl.load(grad_outputs + row * width + channel, mask=valid, other=0.0).to(tl.float32)
        cdf, e = normal_distribution(gate)
        gelu = gate * cdf
        slope = cdf + gate * (0.3989422804014327 * e)
        grad = grad_output * s
        scale_sum += grad_output * (value * gelu)
        tl.store(grad_hidden + 2 * row * width + channel, grad * gelu, mask=valid)
        tl.store(grad_hidden + (2 * row + 1) * width + channel, grad * value * slope, mask=valid)
    tl.store(grad_scale + (chunk * latents + latent) * width + channel, scale_sum, mask=inside)


def forward(hidden: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """y ``[B, N, F]`` in ``dtype``."""
    outputs = hidden.new_empty((*hidden.shape[:2], hidden.shape[2] // 2), dtype=dtype)
    if outputs.numel():
        batch, latents, width, chunk = _sizes(hidden, scale)
        with torch.cuda.device_of(hidden):
            forward_kernel[_grid(batch, latents, width, chunk)](
                hidden.contiguous(),
                scale.contiguous(),
                outputs,
                batch,
                latents,
                width,
                WIDTH_BLOCK=_WIDTH_BLOCK,
                CHUNK=chunk,
                num_warps=_NUM_WARPS,
            )
    return outputs


def backward(grad_outputs: Tensor, hidden: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``hidden`` and ``scale``, in their dtypes."""
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    grad_scale = torch.empty_like(scale, memory_format=torch.contiguous_format)
    if grad_outputs.numel() == 0:
        return grad_hidden, grad_scale.zero_()
    batch, latents, width, chunk = _sizes(hidden, scale)
    chunks = triton.cdiv(batch, chunk)
    parts = grad_scale if chunks == 1 else scale.new_empty((chunks, *scale.shape), dtype=torch.float32)
    with torch.cuda.device_of(hidden):
        backward_kernel[_grid(batch, latents, width, chunk)](
            grad_outputs.contiguous(),
            hidden.contiguous(),
            scale.contiguous(),
            grad_hidden,
            parts,
            batch,
            latents,
            width,
            WIDTH_BLOCK=_WIDTH_BLOCK,
            CHUNK=chunk,
            num_warps=_NUM_WARPS,
        )
        if chunks > 1:
            sum_rows(parts, grad_scale)
    return grad_hidden, grad_scale


def _sizes(hidden: Tensor, scale: Tensor) -> tuple[int, int, int, int]:
    """Batch, latents and width for the kernels, and the images of a chunk, a power of two.

    Rows that share one scale are one latent's.
    """
    batch, latents, width = *hidden.shape[:2], hidden.shape[2] // 2
    if scale.shape[0] == 1:
        batch, latents = batch * latents, 1
    wanted = triton.cdiv(batch * latents * triton.cdiv(width, _WIDTH_BLOCK), _PROGRAMS)
    chunk = min(triton.next_power_of_2(wanted), triton.next_power_of_2(batch), _LONGEST_CHUNK)
    return batch, latents, width, chunk


def _grid(batch: int, latents: int, width: int, chunk: int) -> tuple[int, int]:
    return latents * triton.cdiv(batch, chunk), triton.cdiv(width, _WIDTH_BLOCK)
