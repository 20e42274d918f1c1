"""Counter-based random numbers in plain PyTorch: the same bits as the kernels draw, on any device.

Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011 (philox).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m2mkd_fast.errors import M2MKDError

_WORD = 0xFFFFFFFF


def philox4x32(key: tuple[Tensor, Tensor], counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ten rounds of philox4x32: four random words of four words that count, all of them int64 from 0 to 2^32 - 1."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # Where the int64 product overflows its bits are right all the same.
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((right >> 32) & _WORD) ^ c1 ^ key[0], right & _WORD
        c2, c3 = ((left >> 32) & _WORD) ^ c3 ^ key[1], left & _WORD
        key = ((key[0] + 0x9E3779B9) & _WORD, (key[1] + 0xBB67AE85) & _WORD)
    return c0, c1, c2, c3


def draw_seed(device: torch.device) -> Tensor:
    """A seed from the device's own generator, without waiting for it: ``torch.manual_seed`` reproduces it."""
    return torch.randint(2**63 - 1, (), device=device)


def check_seed(seed: Tensor, device: torch.device) -> None:
    """Raise M2MKDError unless the seed is one int64 number on the device."""
    if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != device:
        raise M2MKDError(
            f"seed has shape {tuple(seed.shape)}, {seed.dtype}, on {seed.device}; expected one int64 number on {device}"
        )


def philox_words(seed: Tensor, count: int, first: int = 0) -> Tensor:
    """``[count, 4]`` int64 words from 0 to 2^32 - 1: those of the counters from ``first`` on, the seed as key."""
    counter, seed = torch.arange(first, first + count, device=seed.device), seed.reshape(())
    zero = torch.zeros_like(counter)
    words = philox4x32((seed & _WORD, (seed >> 32) & _WORD), (counter & _WORD, (counter >> 32) & _WORD, zero, zero))
    return torch.stack(words, dim=-1)


def philox_uniform(seed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Above 0 and at most 1, to which float32 rounds up: of element i, word i mod 4 of counter i div 4."""
    count = math.prod(shape)
    return _uniform(philox_words(seed, (count + 3) // 4).flatten()[:count].view(shape), dtype)


def philox_normal(seed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    r"""Standard normal numbers by Box and Muller.

    With the uniform numbers :math:`u_0 ... u_3` of a counter's words, elements 4 c to 4 c + 3 are
    :math:`r_0 \cos 2\pi u_1,\ r_0 \sin 2\pi u_1,\ r_2 \cos 2\pi u_3,\ r_2 \sin 2\pi u_3`, with
    :math:`r_i = \sqrt{-2 \ln u_i}`.
    """
    count = math.prod(shape)
    uniform = _uniform(philox_words(seed, (count + 3) // 4).view(-1, 2, 2), dtype)
    radius, angle = (-2.0 * uniform[..., 0].log()).sqrt(), 2.0 * math.pi * uniform[..., 1]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten()[:count].view(shape)


def philox_keep(seed: Tensor, rows: int, width: int, probability: float, first: int = 0) -> Tensor:
    """Mask ``[rows, width]`` of what dropout keeps: word j mod 4 of counter ``first + row * ceil(width / 4) + j div 4``
    is at least ``round(probability * 2^32)``."""
    per_row = (width + 3) // 4
    words = philox_words(seed, rows * per_row, first).view(rows, 4 * per_row)[:, :width]
    return words >= round(probability * 2**32)


def _uniform(words: Tensor, dtype: torch.dtype) -> Tensor:
    return (words >> 8).to(dtype) * 2.0**-24 + 2.0**-25
