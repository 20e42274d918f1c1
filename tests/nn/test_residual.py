from __future__ import annotations

import pytest
import torch

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.code_noise import CodeNoise
from m2mkd_fast.nn.residual import DropPath, LayerScale


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
