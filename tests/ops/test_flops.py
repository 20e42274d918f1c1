"""The counter of floating-point operations counts the operators' products as it counts PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from m2mkd_fast.backend import use_backend
from m2mkd_fast.ops.expert_mlp import expert_mlp
from m2mkd_fast.ops.flops import flop_counter
from m2mkd_fast.ops.latent_attention import latent_attention
from m2mkd_fast.ops.read_in_attention import read_in_attention
from m2mkd_fast.ops.route import route


def count(call: Callable[[], Tensor], backend: str) -> tuple[int, int]:
    """Operations of the forward pass, and of the backward pass."""
    with use_backend(backend):
        with flop_counter() as forward:
            out = call()
        with flop_counter() as backward:
            out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def parameters(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("activation", "hidden"), [("gelu", 5), ("swiglu", 10)])
def test_experts(activation, hidden):
    x, up, down = parameters((12, 6), (3, hidden, 6), (3, 4, 5))
    assignment = route(torch.randn(1, 12, 3), top_k=2)
    rows = 24
    products = rows * (hidden * 6 + 5 * 4)

    def call() -> Tensor:
        return expert_mlp(x, assignment, up, None, down, None, activation=activation)

    assert count(call, "cpu") == (2 * products, 4 * products)
    x.requires_grad_(False)
    assert count(call, "cpu") == (2 * products, 2 * products + 2 * rows * 5 * 4)


def test_attention_of_latents_is_that_of_plain_pytorch_and_scores_made_again():
    query, key, value = parameters((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))

    def call() -> Tensor:
        return latent_attention(query, key, value)

    ours, plain = count(call, "cpu"), count(call, "reference")
    assert ours[0] == plain[0] > 0
    assert ours[1] == plain[1] * 5 // 4


def test_reading_in_is_the_sum_of_its_batched_products():
    batch, heads, latents, width, tokens, channels = 2, 3, 5, 4, 7, 6
    tensors = parameters(
        (batch, heads, latents, width),
        (batch, tokens, channels),
        (heads * width, channels),
        (latents, channels),
        (heads * width, channels),
        (latents, channels),
    )
    rows = batch * heads * latents
    # Weights of keys, scores, sum of inputs, weights of values.
    products = rows * (width * channels + channels * tokens + tokens * channels + channels * width)
    assert count(lambda: read_in_attention(*tensors), "torch") == (2 * products, 4 * products)


def test_what_pytorch_counts_is_counted_too():
    weight = torch.randn(4, 3)
    with flop_counter() as counter:
        torch.randn(5, 4) @ weight
    assert counter.get_total_flops() == 2 * 5 * 4 * 3
