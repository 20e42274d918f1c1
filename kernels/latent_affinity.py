r"""Triton kernels of :func:`m2mkd_fast.ops.latent_affinity.latent_affinity`.

With probability p and noise :math:`\upsilon` of an edge, and :math:`r = \frac{1-p}{p} \frac{1-\upsilon}{\upsilon}`,

.. math::
    \log w = -\log(1 + r^{1/T}), \qquad 1 - w = \frac{r^{1/T}}{1 + r^{1/T}}, \qquad \frac{1-p}{p} = e^{d/w} - 1

A program takes a block of edges [U, V] and walks through a chunk of the samples, so that what does not depend on the
noise is computed once per chunk. Noise is made in the kernel, four edges to a call of philox, and made again in the
backward kernel, which sums g (1 - w) over its chunk. Sums over chunks, and those of the bandwidth's gradient over
blocks, go through buffers and are taken in a fixed order: results repeat bit for bit. Everything is float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Enough programs to fill a large GPU. Constants, not properties of the device: the order of summation, and with it the
# last bit, is the same everywhere.
_PROGRAMS = 2048
_BLOCK = 1024
_NUM_WARPS = 4
_LONGEST_CHUNK = 32

_EPS = tl.constexpr(torch.finfo(torch.float32).eps)
_NEAREST = tl.constexpr(-math.log1p(-torch.finfo(torch.float32).eps))  # scaled distance that p = 1 - eps has
_FARTHEST = tl.constexpr(-math.log(torch.finfo(torch.float32).eps))
_LOWEST = tl.constexpr(math.log(torch.finfo(torch.float32).tiny))  # log weight
_ROOT_OF_HALF = tl.constexpr(0x3F3504F3)  # its bits
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440e-4)

_PLAIN, _BINARY, _SEED, _UNIFORM = 0, 1, 2, 3
BINARY, SEED, UNIFORM = tl.constexpr(_BINARY), tl.constexpr(_SEED), tl.constexpr(_UNIFORM)


@triton.jit
def clamped(x, low, high):
    """Unlike minimum and maximum this keeps NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def expm1(x):
    """e^x - 1 for 0 <= x <= 80, by Taylor's series; exact to rounding near 0 as well."""
    n = tl.floor(x * 1.44269504 + 0.5)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = 1.0 / 5040
    p = p * r + 1.0 / 720
    p = p * r + 1.0 / 120
    p = p * r + 1.0 / 24
    p = p * r + 1.0 / 6
    p = p * r + 0.5
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return (p * (r * r) + r) * power + (power - 1.0)


@triton.jit
def log_near_one(f):
    """ln(1 + f) = 2 artanh(f / (2 + f)) for 1 + f within sqrt(1/2) to sqrt(2), by Taylor's series."""
    s = f / (2.0 + f)
    z = s * s
    p = 1.0 / 9
    p = p * z + 1.0 / 7
    p = p * z + 1.0 / 5
    p = p * z + 1.0 / 3
    return 2.0 * (p * z * s + s)


@triton.jit
def log(y):
    """ln(y) for normal numbers y > 0."""
    bits = y.to(tl.int32, bitcast=True) - _ROOT_OF_HALF
    n = (bits >> 23).to(tl.float32)
    m = ((bits & 0x7FFFFF) + _ROOT_OF_HALF).to(tl.float32, bitcast=True)
    return n * _LN2_HIGH + (log_near_one(m - 1.0) + n * _LN2_LOW)


@triton.jit
def log1p(s):
    """ln(1 + s) for s >= 0; keeps NaN. Below sqrt(2) - 1 what 1 + s rounds away is not lost."""
    bits = (1.0 + s).to(tl.int32, bitcast=True) - _ROOT_OF_HALF
    n = (bits >> 23).to(tl.float32)
    m = ((bits & 0x7FFFFF) + _ROOT_OF_HALF).to(tl.float32, bitcast=True)
    value = n * _LN2_HIGH + (log_near_one(tl.where(n == 0.0, s, m - 1.0)) + n * _LN2_LOW)
    return tl.where(s != s, s, value)


@triton.jit
def load_bandwidth(bandwidth):
    """NaN where it is not above zero: to raise an error would wait for the device."""
    width = tl.load(bandwidth)
    return tl.where(width > 0.0, width, float("nan"))


@triton.jit
def noise_of(seed, uniform, sample, first, edge, edges, inside, MODE: tl.constexpr, ALIGNED: tl.constexpr):
    """Noise of one sample's edges [BLOCK / 4, 4], clamped; `sample` and edges are int64."""
    if MODE == UNIFORM:
        u = tl.load(uniform + sample * edges + edge, mask=inside, other=0.5)
    else:
        key = tl.load(seed)
        if ALIGNED:  # four edges in a row share a counter
            w0, w1, w2, w3 = tl.randint4x(key, (sample * edges + first) // 4)
            words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), edge.shape)
        else:
            number = sample * edges + edge
            w0, w1, w2, w3 = tl.randint4x(key, number // 4)
            place = number % 4
            words = tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3))
        u = (words >> 8).to(tl.float32) * 5.9604644775390625e-08 + 2.9802322387695312e-08  # 2^-24, 2^-25
    return clamped(u, _EPS, 1.0 - _EPS)


@triton.jit
def forward_kernel(
    distance,  # [edges]
    bandwidth,  # []
    seed,  # [], int64
    uniform,  # [samples, edges]
    log_affinity,  # [samples, edges]
    edges,
    samples,
    truncation,
    inverse_temperature,
    lowest,  # log of the threshold
    MODE: tl.constexpr,
    LEAKY: tl.constexpr,
    EXPONENT: tl.constexpr,  # 1 / T, or 0 for any T
    ALIGNED: tl.constexpr,  # whether a sample has a multiple of 4 edges
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK + 4 * tl.arange(0, BLOCK // 4)  # of each four edges in a row
    edge = first[:, None] + tl.arange(0, 4)[None, :]
    inside = edge < edges
    d = tl.load(distance + edge, mask=inside, other=0.0)
    width = load_bandwidth(bandwidth)
    cut = d > truncation
    if MODE < SEED:
        value = tl.where(cut, float("-inf"), -tl.div_rn(d, width))
        if MODE == BINARY:
            value = tl.where(value < lowest, float("-inf"), 0.0 * value)  # keeps NaN
        tl.store(log_affinity + edge, value, mask=inside)
    else:
        scaled = d * tl.div_rn(1.0, width)
        if LEAKY:
            scaled = tl.where(cut, float("inf"), scaled)
        odds = expm1(clamped(scaled, _NEAREST, _FARTHEST))
        for step in range(CHUNK):
            sample = tl.program_id(1).to(tl.int64) * CHUNK + step
            drawn = inside & (sample < samples)
            u = noise_of(seed, uniform, sample, first, edge, edges, drawn, MODE, ALIGNED)
            r = odds * (1.0 - u) / u
            if EXPONENT == 2:
                value = -log1p(r * r)
            elif EXPONENT == 1:
                value = -log1p(r)
            else:
                x = log(r) * inverse_temperature
                value = -(tl.where(x > 0.0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))) + (odds - odds)  # keeps NaN
            value = clamped(value, _LOWEST, -_EPS)
            if not LEAKY:
                value = tl.where(cut, float("-inf"), value)
            tl.store(log_affinity + sample * edges + edge, value, mask=drawn)


@triton.jit
def sum_samples_kernel(
    grad,  # [samples, edges]
    distance,  # [edges]
    bandwidth,  # []
    seed,  # [], int64
    uniform,  # [samples, edges]
    partial,  # [chunks, edges]
    edges,
    samples,
    inverse_temperature,
    MODE: tl.constexpr,
    EXPONENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK + 4 * tl.arange(0, BLOCK // 4)  # of each four edges in a row
    edge = first[:, None] + tl.arange(0, 4)[None, :]
    inside = edge < edges
    d = tl.load(distance + edge, mask=inside, other=0.0)
    odds = expm1(clamped(d * tl.div_rn(1.0, load_bandwidth(bandwidth)), _NEAREST, _FARTHEST))
    sums = tl.zeros_like(d)
    for step in range(CHUNK):
        sample = tl.program_id(1).to(tl.int64) * CHUNK + step
        drawn = inside & (sample < samples)  # cut edges, too: a mask of their own would split the loads
        g = tl.load(grad + sample * edges + edge, mask=drawn, other=0.0)
        u = noise_of(seed, uniform, sample, first, edge, edges, drawn, MODE, ALIGNED)
        a = odds * (1.0 - u)
        if EXPONENT == 2:
            complement = a * a / (a * a + u * u)
        elif EXPONENT == 1:
            complement = a / (a + u)
        else:
            x = log(a / u) * inverse_temperature
            small = tl.exp(-tl.abs(x))
            complement = tl.where(x < 0.0, small, 1.0) / (1.0 + small) + (odds - odds)  # keeps NaN
            complement = tl.where(x > -_LOWEST, 0.0, complement)  # log w was clamped
        sums += tl.where(complement < _EPS, 0.0, g * complement)
    tl.store(partial + tl.program_id(1).to(tl.int64) * edges + edge, sums, mask=inside)


@triton.jit
def finish_kernel(
    partial,  # [chunks, edges]; the gradient itself without sampling
    distance,  # [edges]
    bandwidth,  # []
    grad_distance,  # [edges]
    along_distance,  # [blocks]
    edges,
    chunks,
    truncation,
    inverse_temperature,
    SAMPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    edge = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = edge < edges
    d = tl.load(distance + edge, mask=inside, other=0.0)
    width = load_bandwidth(bandwidth)
    without = d > truncation
    sums = tl.zeros_like(d)
    chunk = 0
    while chunk < chunks:  # not `range`: Triton's interpreter cannot count to a number known at run time
        sums += tl.load(partial + tl.cast(chunk, tl.int64) * edges + edge, mask=inside, other=0.0)
        chunk += 1
    if SAMPLED:
        scaled = d / width
        without = without | (scaled < _NEAREST) | (scaled > _FARTHEST)
        # 1 / (1-p) = 1 + p / (1-p)
        sums = sums * (1.0 + 1.0 / expm1(clamped(scaled, _NEAREST, _FARTHEST))) * inverse_temperature
    grad = tl.where(without, 0.0, -sums / width)
    tl.store(grad_distance + edge, grad, mask=inside)
    tl.store(along_distance + tl.program_id(0), tl.sum(tl.where(inside, grad * d, 0.0), axis=0))


@triton.jit
def bandwidth_kernel(
    along_distance,  # [blocks]
    bandwidth,  # []
    grad_bandwidth,  # []
    blocks,
    BLOCK: tl.constexpr,
):
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    place = tl.arange(0, BLOCK)
    first = 0
    while first < blocks:
        sums += tl.load(along_distance + first + place, mask=first + place < blocks, other=0.0)
        first += BLOCK
    # Distance and bandwidth come in as their ratio, so that one gradient follows from the other.
    tl.store(grad_bandwidth, -tl.sum(sums, axis=0) / load_bandwidth(bandwidth))


def chunk_of(samples: int, blocks: int) -> int:
    """Samples a program walks through: a power of two, so that few kernels are compiled for many batch sizes."""
    wanted = triton.cdiv(samples * blocks, _PROGRAMS)
    return min(triton.next_power_of_2(wanted), triton.next_power_of_2(samples), _LONGEST_CHUNK)


def exponent_of(temperature: float) -> int:
    """1 / T where the kernel has it as a constant, else 0."""
    return {0.5: 2, 1.0: 1}.get(temperature, 0)


def forward(
    distance: Tensor,
    bandwidth: Tensor,
    truncation: float | None,
    masked: bool,
    samples: int | None,
    seed: Tensor | None,
    uniform: Tensor | None,
    temperature: float,
    threshold: float | None,
    leaky: bool,
) -> Tensor:
    """``[U, V]``, or ``[samples, U, V]``."""
    mode = _mode(seed, uniform, threshold)
    shape = distance.shape if samples is None else (samples, *distance.shape)
    log_affinity = distance.new_empty(shape)
    if log_affinity.numel():
        edges, count = distance.numel(), samples or 1
        blocks = triton.cdiv(edges, _BLOCK)
        chunk = chunk_of(count, blocks)
        with torch.cuda.device_of(distance):
            forward_kernel[(blocks, triton.cdiv(count, chunk))](
                distance.contiguous(),
                bandwidth,
                _or_unused(seed, bandwidth),
                _or_unused(uniform, bandwidth),
                log_affinity,
                edges,
                count,
                _largest_kept(truncation, masked),
                1 / temperature,
                -math.inf if threshold is None else math.log(threshold),
                MODE=mode,
                LEAKY=leaky,
                EXPONENT=exponent_of(temperature),
                ALIGNED=edges % 4 == 0,
                BLOCK=_BLOCK,
                CHUNK=chunk,
                num_warps=_NUM_WARPS,
            )
    return log_affinity


def backward(
    grad: Tensor,
    distance: Tensor,
    bandwidth: Tensor,
    truncation: float | None,
    masked: bool,
    seed: Tensor | None,
    uniform: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the distance ``[U, V]`` and of the bandwidth."""
    mode = _mode(seed, uniform, None)
    sampled = mode != _PLAIN
    grad_distance = torch.empty_like(distance, memory_format=torch.contiguous_format)
    grad_bandwidth = torch.empty_like(bandwidth)
    if grad.numel() == 0:
        return grad_distance.zero_(), grad_bandwidth.zero_()
    grad, distance = grad.contiguous(), distance.contiguous()
    edges = distance.numel()
    blocks, chunks = triton.cdiv(edges, _BLOCK), 1
    with torch.cuda.device_of(distance):
        if sampled:
            samples = grad.shape[0]
            chunk = chunk_of(samples, blocks)
            chunks = triton.cdiv(samples, chunk)
            partial = distance.new_empty((chunks, *distance.shape))
            sum_samples_kernel[(blocks, chunks)](
                grad,
                distance,
                bandwidth,
                _or_unused(seed, bandwidth),
                _or_unused(uniform, bandwidth),
                partial,
                edges,
                samples,
                1 / temperature,
                MODE=mode,
                EXPONENT=exponent_of(temperature),
                ALIGNED=edges % 4 == 0,
                BLOCK=_BLOCK,
                CHUNK=chunk,
                num_warps=_NUM_WARPS,
            )
        else:
            partial = grad
        along_distance = distance.new_empty(blocks)
        finish_kernel[(blocks,)](
            partial,
            distance,
            bandwidth,
            grad_distance,
            along_distance,
            edges,
            chunks,
            _largest_kept(truncation, masked),
            1 / temperature,
            SAMPLED=sampled,
            BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
        )
        bandwidth_kernel[(1,)](along_distance, bandwidth, grad_bandwidth, blocks, BLOCK=_BLOCK, num_warps=_NUM_WARPS)
    return grad_distance, grad_bandwidth


def _mode(seed: Tensor | None, uniform: Tensor | None, threshold: float | None) -> int:
    if seed is not None:
        return _SEED
    if uniform is not None:
        return _UNIFORM
    return _PLAIN if threshold is None else _BINARY


def _largest_kept(truncation: float | None, masked: bool) -> float:
    """The number that no kept distance is above: the one before the truncation where that is cut, too."""
    if truncation is None or not masked:
        return math.inf if truncation is None else truncation
    return torch.nextafter(torch.tensor(truncation, dtype=torch.float32), torch.tensor(-math.inf)).item()


def _or_unused(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A tensor in any case: the kernel does not touch the one that stands in."""
    return other if tensor is None else tensor.contiguous()
