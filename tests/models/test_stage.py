"""What all stages have in common, on stages of both kinds."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import small

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.nac import NACMediator
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.modules.split import split
from m2mkd_fast.modules.student import student_modules
from m2mkd_fast.nn.cut import Cut
from m2mkd_fast.nn.stitch import LinearStitch

SHAPE = (1, 16, 16)
TARGET = Cut(20, "tokens", (3, 3), 2)


@pytest.fixture(scope="module")
def convnext() -> ModuleChain:
    return split(small("convnext"), [3, 3, 2], SHAPE)


def test_stitches_change_what_a_graph_stage_reads_and_gives(convnext: ModuleChain) -> None:
    plain, stage = convnext[1], copy.deepcopy(convnext[1]).double()
    stage.attach_stitches(TARGET, 30)
    assert (stage.in_cut, stage.out_cut) == (TARGET, Cut(30))
    assert (stage.in_width, stage.out_width) == (20, 30)
    assert (stage.bare_in_cut, stage.bare_out_cut) == (plain.in_cut, plain.out_cut)
    assert stage.pre_stitch.fc.weight.dtype == torch.float64
    given = stage(torch.randn(2, 11, 20, dtype=torch.float64))
    assert given.shape == (2, 4, 30), "the map's positions as tokens"
    assert plain.pre_stitch is None, "the model's own stage stays as it is"


def test_stitches_where_they_make_no_sense_are_refused(convnext: ModuleChain) -> None:
    with pytest.raises(M2MKDError, match="first stage reads images"):
        convnext[0].attach_stitches(TARGET, None)
    with pytest.raises(M2MKDError, match="last stage gives logits"):
        convnext[2].attach_stitches(None, TARGET)
    stage = copy.deepcopy(convnext[1])
    stage.attach_stitches(TARGET, None)
    with pytest.raises(M2MKDError, match="already"):
        stage.attach_stitches(TARGET, None)


def test_a_circuits_stage_has_linear_stitches() -> None:
    module = student_modules(create_model("nac_micro.ring"), None, [24, 24, 24])[1]
    module.pre_stitch = None
    module.attach_stitches(TARGET, None)
    assert isinstance(module, NACMediator)
    assert isinstance(module.pre_stitch, LinearStitch)
    assert module.in_cut == TARGET


@pytest.mark.parametrize("name", ["convnext", "vit"])
def test_stitched_chains_compile_without_a_break(name: str) -> None:
    model = small("convnext") if name == "convnext" else create_model("vit_micro", embed_dim=16, depth=4, num_heads=2)
    cuts = (TARGET, Cut(12, "channels_first", (3, 2)))
    parts = [3, 3, 2] if name == "convnext" else [2, 1, 1]
    chain = ModuleChain(student_modules(model, parts, cuts, image_shape=SHAPE)).eval()
    images = torch.randn(3, *SHAPE)
    compiled = torch.compile(chain, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images), chain(images))
