from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.code_noise import CodeNoise
from m2mkd_fast.nn.modulated_linear import ModulatedLinear
from m2mkd_fast.nn.residual import DropPath, LayerScale, add_branch


def test_layer_scale() -> None:
    states = torch.randn(2, 3, 4)
    torch.testing.assert_close(LayerScale(4, 0.25)(states), 0.25 * states)
    without = LayerScale(4, None)
    assert torch.equal(without(states), states)
    assert not without.state_dict()


def test_drop_path_keeps_the_mean_and_drops_whole_images() -> None:
    torch.manual_seed(0)
    layer, states = DropPath(0.25), torch.ones(4000, 2, 3)
    out = layer(states)
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert torch.equal(out.amin(dim=(1, 2)), out.amax(dim=(1, 2)))
    assert abs(out.mean().item() - 1.0) < 4 * (0.25 / 0.75 / 4000) ** 0.5
    assert torch.equal(layer.eval()(states), states)


def test_drop_path_of_everything_is_refused() -> None:
    with pytest.raises(M2MKDError, match=r"below 1, got 1\.0"):
        DropPath(1.0)


def test_code_noise() -> None:
    torch.manual_seed(0)
    codes = torch.tensor([[2.0, -1.0, 0.0]]).expand(2000, 3).clone().requires_grad_()
    noise = CodeNoise(0.05)
    change = noise(codes) - codes
    assert (change[:, 2] == 0).all()
    assert 0.099 < change[:, 0].abs().max() <= 0.1 + 1e-6
    assert 0.049 < change[:, 1].abs().max() <= 0.05 + 1e-6
    assert change.mean(dim=0).abs().max() < 4 * 0.1 / 3**0.5 / 2000**0.5
    noise(codes).sum().backward()
    assert torch.equal(codes.grad, torch.ones_like(codes)), "the size of the noise is not learned"
    assert torch.equal(noise.eval()(codes), codes)


def branch_layers(
    gamma: float | None = 0.3, bias: bool = True, drop: float = 0.0, of_input: str = "none"
) -> tuple[ModulatedLinear, LayerScale, DropPath]:
    torch.manual_seed(0)
    layer = ModulatedLinear(5, 6, 7, bias=bias, scale_times_input_normalization_type=of_input)
    if bias:
        nn.init.normal_(layer.native_bias)
    scale = LayerScale(6, gamma)
    if gamma is not None:
        nn.init.normal_(scale.gamma, std=gamma)
    return layer, scale, DropPath(drop)


def random_branch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in ((4, 3, 6), (4, 3, 5)))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gamma", [None, 0.3])
@pytest.mark.parametrize("of_input", ["none", "ln"])
def test_branch_is_added(gamma, bias, grad, of_input) -> None:
    modules = nn.ModuleList(branch_layers(gamma, bias, of_input=of_input)).double()
    layer, scale, drop_path = modules
    states, scaled = random_branch()
    expected = states + scale(layer.project(scaled))
    before = states.clone()
    with torch.set_grad_enabled(grad):
        for _ in range(2):  # the second finds the folded weight
            torch.testing.assert_close(add_branch(states, scaled, layer, scale, drop_path), expected)
            torch.testing.assert_close(add_branch(None, scaled, layer, scale, drop_path), expected - states)
            torch.testing.assert_close(add_branch(states, scaled, layer, scale), expected)
    assert torch.equal(states, before)


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_gradients_of_a_branch(drop) -> None:
    layer, scale, drop_path = nn.ModuleList(branch_layers(drop=drop)).double()
    states, scaled = (tensor.requires_grad_() for tensor in random_branch())
    leaves = [states, scaled, layer.native_weight, layer.native_bias, scale.gamma]
    grad = torch.randn(4, 3, 6, dtype=torch.float64)
    torch.manual_seed(3)
    found = torch.autograd.grad(add_branch(states, scaled, layer, scale, drop_path), leaves, grad)
    torch.manual_seed(3)
    expected = torch.autograd.grad(states + drop_path(scale(layer.project(scaled))), leaves, grad)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropped_branches_leave_their_states_alone() -> None:
    layer, scale, drop_path = branch_layers(drop=0.5)
    states, scaled = (tensor.float() for tensor in random_branch())
    for _ in range(20):
        change = (add_branch(states, scaled, layer, scale, drop_path) - states).abs().amax(dim=(1, 2))
        if (change == 0).any() and (change > 0).any():
            break
    else:
        pytest.fail("no draw dropped some branches and kept others")
    with torch.no_grad():
        changed = add_branch(states, scaled, layer, scale, drop_path.eval()) - states
    assert (changed.abs().amax(dim=(1, 2)) > 0).all()


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_branch_under_autocast(dtype, drop) -> None:
    layer, scale, drop_path = branch_layers(gamma=1e-6, drop=drop)
    states, scaled = (tensor.float() for tensor in random_branch())
    states = 1e-6 * states  # so that the branch is seen
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.manual_seed(3)
            exact = (states + drop_path(scale(layer.project(scaled)))).detach()
            for _ in range(2):
                torch.manual_seed(3)
                with torch.autocast("cpu", dtype=dtype):
                    found = add_branch(states, scaled, layer, scale, drop_path)
                assert found.dtype == torch.float32
                assert (found - exact).abs().max() <= 2e-2 * exact.abs().max()


def test_the_folded_weight_follows_its_sources() -> None:
    layer, scale, drop_path = branch_layers()
    states, scaled = (tensor.float() for tensor in random_branch())
    for source in (layer.native_weight, layer.native_bias, scale.gamma):
        with torch.no_grad():
            before = add_branch(states, scaled, layer, scale, drop_path)
            source.mul_(1.5)
            found = add_branch(states, scaled, layer, scale, drop_path)
        assert not torch.equal(found, before)
        torch.testing.assert_close(found, states + scale(layer.project(scaled)))


def test_the_branch_is_not_kept_for_the_gradient_of_gamma() -> None:
    layer, scale, drop_path = branch_layers()
    states, scaled = (tensor.float().requires_grad_() for tensor in random_branch())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        add_branch(states, scaled, layer, scale, drop_path)
    assert all(tensor.numel() != states.numel() or tensor.data_ptr() == scaled.data_ptr() for tensor in saved)


def test_branch_compiles_as_one_graph() -> None:
    layer, scale, drop_path = branch_layers()
    states, scaled = (tensor.float() for tensor in random_branch())
    torch._dynamo.reset()
    compiled = torch.compile(add_branch, fullgraph=True, backend="aot_eager")
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = compiled(states, scaled, layer, scale, drop_path)
            torch.testing.assert_close(found, add_branch(states, scaled, layer, scale, drop_path))
