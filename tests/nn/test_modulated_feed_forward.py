from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from m2mkd_fast.backend import use_backend
from m2mkd_fast.nn import modulated_feed_forward as module
from m2mkd_fast.nn.modulated_feed_forward import GEGLU, ModulatedFeedForward
from m2mkd_fast.ops.modulated_geglu import modulated_geglu


@pytest.mark.parametrize("of_input", ["none", "ln"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("geglu", [False, True])
def test_formula(geglu: bool, grad: bool, of_input: str) -> None:
    torch.manual_seed(0)
    options = {"mod_fc_kwargs": {"scale_times_input_normalization_type": of_input}, "use_geglu": geglu}
    layer = ModulatedFeedForward(4, 5, capacity_factor=1.5, layer_scale_initial_value=0.2, **options).double()
    states, codes = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    hidden = layer.ffn[0](layer.layernorm(states), codes)
    hidden = hidden[..., :6] * F.gelu(hidden[..., 6:]) if geglu else F.gelu(hidden)
    assert hidden.shape == (2, 3, 6)
    expected = states + 0.2 * layer.ffn[2](hidden, codes)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(states, codes), expected)
        torch.testing.assert_close(layer(states, codes[:1]), layer(states, codes[:1].expand(3, 5)))


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("geglu", [False, True])
def test_backends_agree(geglu: bool, drop: float) -> None:
    torch.manual_seed(0)
    layer = ModulatedFeedForward(
        8, 5, capacity_factor=2.0, path_drop_prob=drop, layer_scale_initial_value=0.2, use_geglu=geglu
    ).double()
    states = torch.randn(6, 3, 8, dtype=torch.float64, requires_grad=True)
    codes = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def results(backend: str) -> list[torch.Tensor]:
        torch.manual_seed(1)
        with use_backend(backend):
            outputs = layer(states, codes)
        return [outputs, *torch.autograd.grad(outputs.square().sum(), [states, codes, *layer.parameters()])]

    for ours, theirs in zip(results("auto"), results("reference"), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_rounds_before_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def recorded(*args: Any, **options: Any) -> torch.Tensor:
        seen.append(modulated_geglu(*args, **options))
        return seen[-1]

    monkeypatch.setattr(module, "modulated_geglu", recorded)
    layer = ModulatedFeedForward(4, 5, use_geglu=True, layer_scale_initial_value=1.0)
    states, codes = torch.randn(2, 3, 4), torch.randn(3, 5)
    exact = layer(states, codes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(states, codes)
    assert seen[-1].dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 3e-2 * exact.abs().max()


def test_geglu_gates_with_the_second_half() -> None:
    torch.testing.assert_close(GEGLU()(torch.tensor([2.0, 3.0, 0.0, 1.0])), torch.tensor([0.0, 3.0 * 0.8413447]))
