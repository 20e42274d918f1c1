from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from m2mkd_fast.nn.modulated_feed_forward import GEGLU, ModulatedFeedForward


@pytest.mark.parametrize("geglu", [False, True])
def test_formula(geglu: bool) -> None:
    torch.manual_seed(0)
    layer = ModulatedFeedForward(4, 5, capacity_factor=1.5, layer_scale_initial_value=0.2, use_geglu=geglu).double()
    states, codes = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    hidden = layer.ffn[0](layer.layernorm(states), codes)
    hidden = hidden[..., :6] * F.gelu(hidden[..., 6:]) if geglu else F.gelu(hidden)
    assert hidden.shape == (2, 3, 6)
    torch.testing.assert_close(layer(states, codes), states + 0.2 * layer.ffn[2](hidden, codes))


def test_geglu_gates_with_the_second_half() -> None:
    torch.testing.assert_close(GEGLU()(torch.tensor([2.0, 3.0, 0.0, 1.0])), torch.tensor([0.0, 3.0 * 0.8413447]))
