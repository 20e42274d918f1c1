from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from backbones import IMAGE, SMALL, small, small_spine
from torch import nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.graph_stage import GraphStage
from m2mkd_fast.models.spine import Spine, find_spine


def stages_of(model: nn.Module, spine: Spine, *bounds: int) -> list[GraphStage]:
    bounds = bounds or tuple(range(len(spine.units) + 1))
    return [GraphStage(model, spine, a, b) for a, b in pairwise(bounds)]


def run(stages: list[GraphStage], x: torch.Tensor) -> torch.Tensor:
    for stage in stages:
        x = stage(x)
    return x


@pytest.mark.parametrize("kind", SMALL)
def test_one_stage_a_unit_is_the_model_bit_for_bit(kind: str) -> None:
    model, spine = small_spine(kind)
    stages = stages_of(model, spine)
    x = torch.randn(5, *IMAGE)
    assert torch.equal(run(stages, x), model(x))
    assert model(x).std() > 0
    for given, cut in zip(stages, spine.cuts, strict=False):
        x = given(x)
        channels = 1 if cut.layout == "channels_first" else -1
        assert x.shape[channels] == cut.width == given.out_width
        assert given.out_cut == cut


@pytest.mark.parametrize("kind", SMALL)
def test_train_mode_is_the_models_with_dropout_statistics_and_gradients(kind: str) -> None:
    model = small(kind).train()
    other = copy.deepcopy(model)
    stages = stages_of(other, small_spine(kind)[1])
    x = torch.randn(4, *IMAGE)
    for network in (model, lambda x: run(stages, x)):
        torch.manual_seed(0)
        network(x).square().sum().backward()
    for (name, tensor), copied in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (tensor.grad is None) == (copied.grad is None), name
        if sum(name in stage.state_dict() for stage in stages) > 1:  # its gradients are summed in another order
            torch.testing.assert_close(copied.grad, tensor.grad)
        else:
            assert tensor.grad is None or torch.equal(tensor.grad, copied.grad), name
    for (name, tensor), copied in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(tensor, copied), name


@pytest.mark.parametrize("kind", SMALL)
def test_state_names_are_the_models(kind: str) -> None:
    model, spine = small_spine(kind)
    stages = stages_of(model, spine)
    full = model.state_dict(keep_vars=True)
    held = [name for stage in stages for name in stage.state_dict()]
    for stage in stages:
        for name, tensor in stage.state_dict(keep_vars=True).items():
            assert tensor is full[name]
        assert list(stage.state_dict()) == [name for name in full if name in stage.state_dict()]
        assert stage.no_weight_decay() <= set(stage.state_dict())
    assert set(held) == set(full), "nothing is left out"
    if kind != "beit":
        assert len(held) == len(set(held))


def test_a_table_that_several_stages_need_is_in_each() -> None:
    model, spine = small_spine("beit")
    table = model.rel_pos_bias.relative_position_bias_table
    for stage in stages_of(model, spine):
        assert stage.state_dict(keep_vars=True)["rel_pos_bias.relative_position_bias_table"] is table


def test_a_copy_is_independent() -> None:
    model, spine = small_spine("swin")
    stage = GraphStage(model, spine, 1, 3)
    x = torch.randn(2, 16, 16, 8)
    expected = stage(x)
    copied = copy.deepcopy(stage)
    assert torch.equal(copied(x), expected)
    assert {id(p) for p in copied.parameters()}.isdisjoint(id(p) for p in model.parameters())
    with torch.no_grad():
        next(copied.parameters()).add_(1)
    assert torch.equal(stage(x), expected)
    assert not torch.equal(copied(x), expected)


def test_what_the_stage_before_gave_is_not_written_to() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(
                *(nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1)) for _ in range(3))
            )
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(self.conv(x)).mean((2, 3))

    model = InPlace().eval()
    first, second = stages_of(model, find_spine(model, (1, 4, 4)), 0, 1, 3)
    x = torch.randn(5, 1, 4, 4)
    given = first(x)
    before = given.clone()
    assert torch.equal(second(given), model(x))
    assert torch.equal(given, before)


def test_stitches_at_both_ends() -> None:
    model, spine = small_spine("convnext")
    stage = copy.deepcopy(GraphStage(model, spine, 1, 3))
    stage.attach_stitches(6, 7)
    assert (stage.in_width, stage.out_width) == (6, 7)
    assert stage(torch.randn(2, 64, 6)).shape == (2, 16, 7)
    assert {"pre_stitch.fc.weight", "post_stitch.fc.weight"} <= set(stage.state_dict())


@pytest.mark.slow
def test_compiled_without_a_break() -> None:
    model, spine = small_spine("swin")
    stages = stages_of(model, spine, 0, 2, len(spine.units))
    compiled = [torch.compile(stage, fullgraph=True, backend="eager", dynamic=False) for stage in stages]
    x = torch.randn(2, *IMAGE)
    assert torch.equal(run(compiled, x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = small("eva").to(dtype)
    x = torch.randn(3, *IMAGE, dtype=dtype)
    assert torch.equal(run(stages_of(model, find_spine(model)), x), model(x))


def test_names_that_a_stage_needs_itself_are_refused() -> None:
    model = nn.Sequential()
    model.depth = nn.Sequential(*(nn.Sequential(nn.Conv2d(1, 1, 1)) for _ in range(2)))
    spine = find_spine(model, (1, 4, 4))
    with pytest.raises(M2MKDError, match="its 'depth' has the name of an attribute"):
        GraphStage(model, spine, 0, 1)


def test_bounds_are_checked() -> None:
    model, spine = small_spine("resnet")
    for start, stop in ((0, 6), (2, 2), (-1, 2)):
        with pytest.raises(M2MKDError, match=r"0 <= start < stop <= 5"):
            GraphStage(model, spine, start, stop)
