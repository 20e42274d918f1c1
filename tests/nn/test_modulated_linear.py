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

    def recorded(*args: Any, **options: Any) -> list[torch.Tensor]:
        seen.extend(modulated_norm(*args, **options))
        return seen

    monkeypatch.setattr(modulated_linear_module, "modulated_norm", recorded)
    norm, layer = nn.LayerNorm(4), ModulatedLinear(4, 6, 5, scale_times_input_normalization_type=of_input)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (projected,) = normalize_and_project(norm, [layer], STATES.float(), CODES.float())
        expected = layer(norm(STATES.float()), CODES.float())
    assert seen[0].dtype == rounded
    assert torch.equal(projected, expected)


def test_scales_are_computed_once_in_evaluation() -> None:
    options = {"learnable_scale_gain": True, "add_one_to_scale": True}
    layer = ModulatedLinear(4, 6, 5, **options).double().eval()
    codes = nn.Parameter(CODES.clone())
    with torch.no_grad():
        scale = layer.input_scale(codes)
        assert layer.input_scale(codes) is scale
    assert layer.input_scale(codes).requires_grad
    for source in (codes, layer.scale.weight, layer.scale_gain):
        with torch.no_grad():
            before = layer.input_scale(codes)
            source.add_(0.5)
            found = layer.input_scale(codes)
        assert not torch.equal(found, before)
        torch.testing.assert_close(found, layer.input_scale(codes).detach(), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(layer.input_scale(codes[:1]), layer.input_scale(codes)[:1])
        exact = layer.float().input_scale(codes.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not torch.equal(layer.input_scale(codes.float()), exact)


def test_an_adapter_in_place_of_the_scale_is_followed() -> None:
    class Adapted(nn.Linear):
        shift = nn.Parameter(torch.zeros(()))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs) + self.shift

    layer = ModulatedLinear(4, 6, 5, scale_normalization_type="none")
    layer.scale = Adapted(5, 4, bias=False)
    with torch.no_grad():
        before = layer.input_scale(CODES.float())
        Adapted.shift.add_(1.0)
        torch.testing.assert_close(layer.input_scale(CODES.float()), before + 1.0)


def test_no_stack_and_no_copy_between_scales_and_products() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    norm, layers = nn.LayerNorm(4), [ModulatedLinear(4, 6, 5, bias=False) for _ in range(2)]
    with torch.no_grad():
        normalize_and_project(norm, layers, STATES.float(), CODES.float())
        codes, names = CODES.float(), []
        normalize_and_project(norm, layers, STATES.float(), codes)
        names.clear()
        with Names():
            normalize_and_project(norm, layers, STATES.float(), codes)
    assert not [name for name in names if name.partition(".")[0] in ("stack", "cat", "clone", "copy_", "layer_norm")]


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
