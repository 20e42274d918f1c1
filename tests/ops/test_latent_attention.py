"""Attention with affinities: plain attention as a special case, rows without edges."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from m2mkd_fast.ops.latent_attention import latent_attention


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def test_is_scaled_dot_product_attention_with_a_bias() -> None:
    query, key, value, affinity = tensors((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8), (4, 5))
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=affinity)
    torch.testing.assert_close(latent_attention(query, key, value, affinity), expected)
    torch.testing.assert_close(latent_attention(query, key, value), F.scaled_dot_product_attention(query, key, value))


def test_affinities_can_differ_between_images() -> None:
    query, key, value, affinity = tensors((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8), (2, 4, 5))
    together = latent_attention(query, key, value, affinity)
    for image in range(2):
        alone = latent_attention(
            query[image : image + 1], key[image : image + 1], value[image : image + 1], affinity[image]
        )
        torch.testing.assert_close(together[image : image + 1], alone)


def test_scale_multiplies_weights_after_the_softmax() -> None:
    query, key, value, scale = tensors((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8), (4, 5))
    weights = (query @ key.mT / math.sqrt(8)).softmax(dim=-1) * scale.exp()
    torch.testing.assert_close(latent_attention(query, key, value, log_scale=scale), weights @ value)


@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5)])
def test_receiver_without_edges_hears_nothing(shape: tuple[int, ...]) -> None:
    query, key, value, affinity = tensors((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8), shape)
    cut = torch.zeros(shape, dtype=torch.bool)
    cut[..., 1, :] = True
    out = latent_attention(query, key, value, affinity.masked_fill(cut, -math.inf))
    assert (out[:, :, 1] == 0).all()
    others = [0, 2, 3]
    torch.testing.assert_close(out[:, :, others], latent_attention(query, key, value, affinity)[:, :, others])
    out.sum().backward()
    for tensor in (query, key, value, affinity):
        assert tensor.grad.isfinite().all()
    assert (query.grad[:, :, 1] == 0).all()
    assert (affinity.grad[..., 1, :] == 0).all()
