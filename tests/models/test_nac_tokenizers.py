"""The ConvNeXt tokenizer against timm's blocks, and the pooling of output latents."""

from __future__ import annotations

import pytest
import torch
from timm.models.convnext import ConvNeXtBlock as TimmBlock

from m2mkd_fast.models.nac.tokenizers import (
    CAPACITIES,
    ConvNeXt,
    ConvNeXtBlock,
    ConvNeXtImageTokenizer,
    FirstSlotAsLogits,
    OutputLatentPooling,
)

TIMM_NAMES = {"dwconv.": "conv_dw.", "pwconv1.": "mlp.fc1.", "pwconv2.": "mlp.fc2."}


def test_block_is_timms_under_the_published_names() -> None:
    torch.manual_seed(0)
    block = ConvNeXtBlock(8, layer_scale_init_value=0.5).double()
    state = block.state_dict()
    for published, timm in TIMM_NAMES.items():
        state = {key.replace(published, timm): value for key, value in state.items()}
    theirs = TimmBlock(8, ls_init_value=0.5).double()
    theirs.load_state_dict(state, strict=True)
    images = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(block(images), theirs(images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_tokens(capacity: str, num_stages: int) -> None:
    size = 32 // (4 * 2 ** (num_stages - 1))
    grid = {"dim": 3, "grid_size": [size, size]}
    tokenizer = ConvNeXtImageTokenizer(2, 16, capacity, num_stages, positional_grid_kwargs=grid)
    tokens = tokenizer(torch.randn(2, 2, 32, 32))
    assert tokens.shape == (2, size**2, tokenizer.output_dim)
    assert tokenizer.output_dim == 16 // 2 ** (3 - num_stages) + 3
    assert torch.equal(tokens[0, :, -3:], tokens[1, :, -3:]), "positions are the same for all images"


def test_deeper_blocks_are_dropped_more_often() -> None:
    backbone = ConvNeXt(3, depths=(1, 2), dims=(4, 8), drop_path_rate=0.3)
    rates = [block.drop_path.drop_prob for stage in backbone.stages for block in stage]
    assert rates == pytest.approx([0.0, 0.15, 0.3])


def test_first_slot() -> None:
    states = torch.randn(2, 3, 4)
    assert torch.equal(FirstSlotAsLogits()(states), states[:, 0])


def test_pooling_weighs_latents_by_confidence() -> None:
    torch.manual_seed(0)
    pooling = OutputLatentPooling(4, 5, softmax_type="vanilla", softmax_temperature=0.5)
    states = torch.randn(2, 3, 4)
    weights = (pooling.confidence_scorer(states)[..., 0] / 0.5).softmax(dim=-1)
    expected = torch.stack([pooling.to_logits((w[:, None] * s).sum(0)) for w, s in zip(weights, states, strict=True)])
    torch.testing.assert_close(pooling(states), expected)


def test_gumbel_choices() -> None:
    torch.manual_seed(0)
    confidences = torch.tensor([[2.0, 0.0, 1.0]])
    hard = OutputLatentPooling(4, 5, softmax_type="gumbel-hard")
    assert torch.equal(hard.eval().weights(confidences), torch.tensor([[1.0, 0.0, 0.0]]))
    drawn = hard.train().weights(confidences.expand(4000, 3))
    assert ((drawn == 0) | ((drawn - 1).abs() < 1e-6)).all()
    # Gumbel-max draws from the softmax; four standard deviations at most.
    torch.testing.assert_close(drawn.mean(dim=0), confidences.softmax(dim=-1)[0], rtol=0, atol=4 * 0.5 / 4000**0.5)
    soft = OutputLatentPooling(4, 5, softmax_type="gumbel")
    torch.testing.assert_close(soft.eval().weights(confidences), confidences.softmax(dim=-1))
    assert not torch.equal(soft.train().weights(confidences), soft.weights(confidences))
