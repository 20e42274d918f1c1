from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.models.transformer_stage import TransformerStage, check_supported


def small_vit(**overrides: object) -> nn.Module:
    torch.manual_seed(0)
    return create_model("vit_micro", **{"embed_dim": 16, "num_heads": 2, "depth": 4, **overrides})


def test_a_stage_is_a_view() -> None:
    model = small_vit()
    stage = TransformerStage(model, 1, 3)
    assert stage.blocks[0].mlp.fc1.weight is model.blocks[1].mlp.fc1.weight
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.fill_(2.0)
    assert stage.state_dict()["blocks.0.mlp.fc1.weight"].eq(2.0).all()
    assert len(list(model.parameters())) == len(list(small_vit().parameters())), "the model is unchanged"


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 2), (0, 5)])
def test_blocks_that_are_not_there_are_refused(start: int, stop: int) -> None:
    with pytest.raises(M2MKDError, match=f"not {start} and {stop}"):
        TransformerStage(small_vit(), start, stop)


def test_facts_of_first_middle_and_last() -> None:
    model = small_vit(img_size=(16, 8))
    first, middle, last = (TransformerStage(model, *cut) for cut in ((0, 1), (1, 3), (3, 4)))
    assert [(s.in_width, s.out_width) for s in (first, middle, last)] == [(None, 16), (16, 16), (16, None)]
    assert [s.depth for s in (first, middle, last)] == [1, 2, 1]
    assert first.image_shape == (1, 16, 8)
    assert first.tokens == 4 * 2 + 1
    assert last.num_classes == 10
    assert {name.split(".")[0] for name in middle.state_dict()} == {"blocks"}
    assert TransformerStage(small_vit(patch_drop_rate=0.5), 0, 1).tokens is None


def test_stitches_change_the_widths_and_are_applied() -> None:
    model = small_vit()
    plain = TransformerStage(model, 1, 3)
    stage = copy.deepcopy(plain)
    stage.attach_stitches(24, 40)
    assert (stage.in_width, stage.out_width) == (24, 40)
    added = set(stage.state_dict()) - set(plain.state_dict())
    assert added == {
        f"{side}_stitch.{part}" for side in ("pre", "post") for part in ("ln.weight", "ln.bias", "fc.weight", "fc.bias")
    }
    x = torch.randn(2, 5, 24)
    assert torch.equal(stage(x), stage.post_stitch(plain(stage.pre_stitch(x))))


def test_stitches_follow_dtype_and_mode() -> None:
    stage = TransformerStage(small_vit().double().eval(), 1, 3)
    stage.attach_stitches(24, None)
    assert stage.pre_stitch.fc.weight.dtype == torch.float64
    assert not stage.pre_stitch.training
    assert stage.post_stitch is None


def test_stitches_where_they_make_no_sense_are_refused() -> None:
    model = small_vit()
    with pytest.raises(M2MKDError, match="first stage reads images"):
        TransformerStage(model, 0, 2).attach_stitches(24, 24)
    with pytest.raises(M2MKDError, match="last stage gives logits"):
        TransformerStage(model, 2, 4).attach_stitches(24, 24)
    stage = TransformerStage(model, 1, 2)
    stage.attach_stitches(24, None)
    with pytest.raises(M2MKDError, match="already"):
        stage.attach_stitches(24, None)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = small_vit()
    x = torch.randn(2, 17, 16)
    gradients = []
    for checkpointing in (False, True):
        stage = copy.deepcopy(TransformerStage(model, 1, 3))
        stage.set_grad_checkpointing(checkpointing)
        stage(x.clone().requires_grad_()).square().sum().backward()
        gradients.append([parameter.grad for parameter in stage.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_travels_to_another_process() -> None:
    stage = copy.deepcopy(TransformerStage(small_vit(), 0, 2))
    stage.attach_stitches(None, 24)
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(pickle.loads(pickle.dumps(stage))(x), stage(x))


def test_compiles_without_a_break() -> None:
    stage = TransformerStage(small_vit(), 0, 2)
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(torch.compile(stage, backend="eager", fullgraph=True)(x), stage(x))


def test_fresh_is_independent_newly_drawn_and_without_dropout() -> None:
    model = small_vit(drop_path_rate=0.3, proj_drop_rate=0.1, pos_drop_rate=0.1, patch_drop_rate=0.2, init_values=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    stage = TransformerStage(model, 0, 2).eval()
    torch.manual_seed(1)
    fresh = stage.fresh(3, start=0)
    torch.manual_seed(1)
    again = stage.fresh(3, start=0)
    assert fresh.depth == 3
    for (name, new), other in zip(fresh.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(new, other), name
        assert not new.eq(7.0).any(), name
    assert fresh.blocks[0].ls1.gamma.eq(0.5).all(), "layer scale starts from its constructor value"
    assert fresh.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(fresh.blocks[0].mlp.fc1.weight, fresh.blocks[1].mlp.fc1.weight)
    assert all(parameter.eq(7.0).all() for parameter in model.parameters()), "the source is untouched"
    assert fresh.training
    assert not any(isinstance(module, DropPath) for module in fresh.modules())
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(fresh(x), fresh(x)), "train mode draws nothing"


def test_fresh_draws_the_distillation_token_and_head() -> None:
    model = create_model("deit_tiny_distilled_patch16_224", embed_dim=16, num_heads=2, depth=2, img_size=32)
    whole = TransformerStage(model, 0, 2)
    fresh = whole.fresh(2, start=0)
    for name in ("dist_token", "cls_token", "pos_embed", "head.weight", "head_dist.weight", "patch_embed.proj.weight"):
        assert not torch.equal(fresh.get_parameter(name), whole.get_parameter(name)), name


def test_fresh_scales_by_the_place_in_its_new_chain() -> None:
    stage = TransformerStage(small_vit(fix_init=True), 1, 3)
    deviations = []
    for start in (0, 7):
        torch.manual_seed(0)
        deviations.append(stage.fresh(1, start=start).blocks[0].mlp.fc2.weight.std().item())
    assert deviations[0] / deviations[1] == pytest.approx(8**0.5, rel=1e-4)


class OwnForward(VisionTransformer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_unsupported_models_are_named() -> None:
    with pytest.raises(M2MKDError, match=r"torch\.nn\.modules\.linear\.Linear.*supported are"):
        check_supported(nn.Linear(2, 2))
    with pytest.raises(M2MKDError, match=r"OwnForward.*`forward` of its own"):
        check_supported(OwnForward(img_size=16, patch_size=4, embed_dim=16, num_heads=2, depth=2))
    with pytest.raises(M2MKDError, match="`forward` of its own"):
        check_supported(TransformerStage(small_vit(), 0, 2))
    strange = small_vit()
    strange.adapter = nn.Linear(2, 2)
    with pytest.raises(M2MKDError, match="no known place for its adapter"):
        check_supported(strange)


def test_golden_published_teacher_stage(golden_dir, read_golden, assert_golden) -> None:
    """The first meta stage with the published weights computes the published prefix activations."""
    metadata, tensors = read_golden(golden_dir / "m2mkd_vmoe_idx1_soft.safetensors")
    config = metadata["config"]
    model = create_model("vit_micro", in_chans=3, depth=3, **config["vit"]).double()
    stage = TransformerStage(model, 0, 1)
    prefix = "meta/stages.0."
    stage.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, strict=True)
    assert_golden(stage(tensors["in/x"]), tensors["out/meta_output"], "out/meta_output")
