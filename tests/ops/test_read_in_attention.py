"""The rearranged read-in attention against its definition with all keys and values."""

from __future__ import annotations

import pytest
import torch

from m2mkd_fast.ops.read_in_attention import read_in_attention, read_in_attention_reference

BATCH, HEADS, LATENTS, TOKENS, DIM, CHANNELS = 2, 3, 4, 7, 5, 6


def arguments(bias: bool, scales: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (BATCH, HEADS, LATENTS, DIM),
        (BATCH, TOKENS, CHANNELS),
        (HEADS * DIM, CHANNELS),
        (scales, CHANNELS),
        (HEADS * DIM, CHANNELS),
        (scales, CHANNELS),
    ]
    shapes += [(HEADS * DIM,), (HEADS * DIM,)] if bias else []
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scales", [LATENTS, 1], ids=["own scales", "shared scale"])
def test_rearranged_products_are_exact(bias: bool, scales: int) -> None:
    inputs = arguments(bias, scales)
    expected = read_in_attention_reference(*inputs)
    actual = read_in_attention(*inputs)
    assert expected.shape == (BATCH, HEADS, LATENTS, DIM)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    grad = torch.randn_like(expected)
    gradients = zip(torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True)
    for ours, theirs in gradients:
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_definition_for_one_latent_and_head() -> None:
    query, inputs, key_weight, key_scale, value_weight, value_scale = arguments(bias=False, scales=LATENTS)
    latent, head = 2, 1
    rows = slice(head * DIM, (head + 1) * DIM)
    keys = (inputs * key_scale[latent]) @ key_weight[rows].T
    values = (inputs * value_scale[latent]) @ value_weight[rows].T
    weights = (keys @ query[:, head, latent, :, None] / DIM**0.5).softmax(dim=1)
    out = read_in_attention(query, inputs, key_weight, key_scale, value_weight, value_scale)
    torch.testing.assert_close(out[:, head, latent], (weights * values).sum(dim=1))
