from __future__ import annotations

import pytest
import torch
from torch.nn import functional

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
