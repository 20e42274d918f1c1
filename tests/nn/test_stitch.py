from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.cut import Cut, rearrange
from m2mkd_fast.nn.stitch import Stitch


def test_normalises_then_maps() -> None:
    torch.manual_seed(0)
    stitch = Stitch(6, 4).double()
    with torch.no_grad():
        for parameter in stitch.parameters():
            parameter.normal_()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = functional.linear(normal * stitch.ln.weight + stitch.ln.bias, stitch.fc.weight, stitch.fc.bias)
    torch.testing.assert_close(stitch(x), expected, rtol=1e-12, atol=1e-12)


def test_starts_as_published() -> None:
    torch.manual_seed(0)
    stitch = Stitch(200, 300)
    assert stitch.ln.eps == 1e-5
    assert torch.equal(stitch.fc.bias, torch.zeros(300))
    assert stitch.fc.weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.golden_case("m2mkd_vmoe_idx*_soft.safetensors")
def test_golden_names_and_shapes(golden_case, read_golden) -> None:
    _, tensors = read_golden(golden_case)
    found = 0
    for side in ("pre_stitch", "post_stitch"):
        published = {
            name.split(f"{side}.")[1]: tensor.shape
            for name, tensor in tensors.items()
            if name.startswith("student/blocks") and f"{side}." in name
        }
        if published:
            found += 1
            outputs, inputs = published["fc.weight"]
            assert {name: tensor.shape for name, tensor in Stitch(inputs, outputs).state_dict().items()} == published
    assert found > 0


def test_between_layouts_the_features_are_normalised_and_mapped() -> None:
    torch.manual_seed(0)
    source, target = Cut(6, "tokens", (4, 4), 1), Cut(3, "channels_first", (2, 2))
    stitch, plain = Stitch(6, 3, source, target), Stitch(6, 3)
    plain.load_state_dict(stitch.state_dict())
    x = torch.randn(2, 17, 6)
    expected = plain(rearrange(x, source, Cut(6, "channels_last", (2, 2)))).permute(0, 3, 1, 2)
    torch.testing.assert_close(stitch(x), expected)
    back = Stitch(3, 6, target, source)(stitch(x))
    assert back.shape == x.shape


def test_cuts_that_do_not_fit_the_widths_are_refused() -> None:
    with pytest.raises(M2MKDError, match="give both cuts, or neither"):
        Stitch(6, 3, Cut(6))
    with pytest.raises(M2MKDError, match="widths 6 -> 3 between tokens of width 6 and tokens of width 4"):
        Stitch(6, 3, Cut(6), Cut(4))
