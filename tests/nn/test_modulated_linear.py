from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from m2mkd_fast.errors import UnknownNameError
from m2mkd_fast.nn import modulated_linear as modulated_linear_module
from m2mkd_fast.nn.modulated_linear import ModulatedLinear, modulated_linear, normalize_and_project
from m2mkd_fast.ops.modulated_norm import modulated_norm

NORMALIZATIONS = {
    "ln": lambda x: F.layer_norm(x, x.shape[-1:]),
    "l2": lambda x: F.normalize(x, dim=-1),
    "none": lambda x: x,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
STATES = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CODES = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("add_one", [False, True])
@pytest.mark.parametrize("of_input", ["none", "ln", "l2"])
@pytest.mark.parametrize("of_scale", list(NORMALIZATIONS))
def test_formula(of_scale: str, of_input: str, add_one: bool) -> None:
    layer = ModulatedLinear(
        4,
        6,
        5,
        scale_normalization_type=of_scale,
        scale_gain=0.3,
        add_one_to_scale=add_one,
        scale_times_input_normalization_type=of_input,
    ).double()
    nn.init.normal_(layer.native_bias)
    scale = 0.3 * NORMALIZATIONS[of_scale](CODES @ layer.scale.weight.T) + (1.0 if add_one else 0.0)
    expected = NORMALIZATIONS[of_input](STATES * scale) @ layer.native_weight.T + layer.native_bias
    torch.testing.assert_close(layer(STATES, CODES), expected)


def test_one_code_serves_all_latents() -> None:
    layer = ModulatedLinear(4, 6, 5).double()
    torch.testing.assert_close(layer(STATES, CODES[:1]), layer(STATES, CODES[:1].expand(3, 5)))


@pytest.mark.parametrize("of_input", ["none", "ln"])
def test_one_normalisation_for_several_layers(of_input: str) -> None:
    norm = nn.LayerNorm(4, eps=1e-3).double()
    nn.init.normal_(norm.weight)
    options = {"scale_times_input_normalization_type": of_input}
    layers = [ModulatedLinear(4, size, 5, **options).double() for size in (6, 7)]
    for layer, projected in zip(layers, normalize_and_project(norm, layers, STATES, CODES), strict=True):
        torch.testing.assert_close(projected, layer(norm(STATES), CODES))


@pytest.mark.parametrize(("of_input", "rounded"), [("none", torch.bfloat16), ("ln", torch.float32)])
def test_autocast_rounds_before_the_product(
    monkeypatch: pytest.MonkeyPatch, of_input: str, rounded: torch.dtype
) -> None:
    """The numbers are those of a product that rounds by itself."""
    seen = []

    def recorded(*args: Any, **options: Any) -> torch.Tensor:
        seen.append(modulated_norm(*args, **options))
        return seen[-1]

    monkeypatch.setattr(modulated_linear_module, "modulated_norm", recorded)
    norm, layer = nn.LayerNorm(4), ModulatedLinear(4, 6, 5, scale_times_input_normalization_type=of_input)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (projected,) = normalize_and_project(norm, [layer], STATES.float(), CODES.float())
        expected = layer(norm(STATES.float()), CODES.float())
    assert seen[0].dtype == rounded
    assert torch.equal(projected, expected)


def test_gain_is_learned_only_where_asked() -> None:
    names = {name for name, _ in ModulatedLinear(4, 6, 5, learnable_scale_gain=True).named_parameters()}
    assert names == {"native_weight", "native_bias", "scale.weight", "scale_gain"}
    names = {name for name, _ in ModulatedLinear(4, 6, 5, bias=False).named_parameters()}
    assert names == {"native_weight", "scale.weight"}


def test_unknown_options() -> None:
    with pytest.raises(UnknownNameError, match="scale_normalization_type 'l1'"):
        ModulatedLinear(4, 6, 5, scale_normalization_type="l1")
    with pytest.raises(UnknownNameError, match="scale_times_input_normalization_type 'tanh'"):
        ModulatedLinear(4, 6, 5, scale_times_input_normalization_type="tanh")
    with pytest.raises(UnknownNameError, match="did you mean 'scale_gain'"):
        modulated_linear(4, 6, 5, {"scale_gains": 1.0})
