"""V-MoE models: where the mixtures are, how they start, and that they train."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.models.registry import create_model, list_models
from m2mkd_fast.models.vmoe import VMoE, moe_positions
from m2mkd_fast.modules.split import split, verify_split
from m2mkd_fast.nn.expert_mlp import fastmoe_state_dict
from m2mkd_fast.nn.router import ROUTERS
from m2mkd_fast.nn.vision_moe import VisionMoE, auxiliary_losses, expert_load


def micro(tag: str = "m2mkd", **overrides: object) -> VMoE:
    torch.manual_seed(0)
    return create_model(f"vmoe_micro.{tag}", **{"embed_dim": 16, "depth": 4, **overrides})


def images(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 1, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("spec", "depth", "positions"),
    [
        ("all", 3, (0, 1, 2)),
        ("every2", 12, (1, 3, 5, 7, 9, 11)),
        ("every3", 8, (2, 5)),
        ("last2", 8, (5, 7)),
        ("last2", 12, (9, 11)),
        ("last5", 32, (23, 25, 27, 29, 31)),
        ("last1", 5, (3,)),  # odd blocks only: the last block of an odd depth is none of them
        ([3, 0], 4, (0, 3)),
        ((), 4, ()),
    ],
)
def test_positions_of_the_mixtures(spec: object, depth: int, positions: tuple[int, ...]) -> None:
    assert moe_positions(spec, depth) == positions
    model = micro(moe_blocks=spec, depth=depth)
    assert model.moe_blocks == positions
    for index, block in enumerate(model.blocks):
        assert hasattr(block, "moe") == (index in positions) != hasattr(block, "mlp")


@pytest.mark.parametrize("spec", ["last0", "most", "every", "every5", "last3", [4], [-1], [1, 1]])
def test_positions_that_do_not_fit_are_refused(spec: object) -> None:
    with pytest.raises(M2MKDError, match="moe_blocks is"):
        moe_positions(spec, 4)


PUBLISHED = {  # patch, width, depth, heads, hidden width, and the blocks with mixtures of the two tags
    "vmoe_small32": (32, 512, 8, 8, 2048, {"every2": range(1, 8, 2), "last2": (5, 7)}),
    "vmoe_base": (16, 768, 12, 12, 3072, {"every2": range(1, 12, 2), "last2": (9, 11), "m2mkd": range(12)}),
    "vmoe_base32": (32, 768, 12, 12, 3072, {"every2": range(1, 12, 2), "last2": (9, 11)}),
    "vmoe_large": (16, 1024, 24, 16, 4096, {"every2": range(1, 24, 2), "last2": (21, 23), "m2mkd": range(24)}),
    "vmoe_huge": (14, 1280, 32, 16, 5120, {"every2": range(1, 32, 2), "last5": range(23, 32, 2), "m2mkd": range(32)}),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_variants(size: str) -> None:
    patch, width, depth, heads, hidden, tags = PUBLISHED[size]
    assert {name.split(".")[1] for name in list_models(f"{size}.*")} == set(tags)
    for tag, positions in tags.items():
        with torch.device("meta"):
            model = create_model(f"{size}.{tag}")
        assert model.patch_embed.proj.kernel_size == (patch, patch)
        assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (width, depth, heads)
        assert model.moe_blocks == tuple(positions)
        moe = model.blocks[positions[-1]].moe
        assert moe.experts.htoh4.weight.shape == (8, hidden, width)
        assert moe.gate.top_k == 2
        assert moe.gate.kind == ("top_k_softmax" if tag == "m2mkd" else "softmax_top_k")
        assert moe.experts.activation == ("gelu" if tag == "m2mkd" else "gelu_tanh")
        assert model.norm.eps == 1e-6
        if tag != "m2mkd":
            assert not any(key.startswith("stages.") for key in model.state_dict())
            assert "moe.gate.gate.bias" not in "".join(model.state_dict())
            dense = next(block for block in model.blocks if hasattr(block, "mlp"))
            assert type(dense.mlp.act).__name__ == "GELUTanh"


@pytest.mark.parametrize("tag", ["m2mkd", "every2", "last2"])
def test_micro_models_train(tag: str) -> None:
    torch.manual_seed(0)
    model = create_model(f"vmoe_micro.{tag}").train()
    assert (model.embed_dim, len(model.blocks), model.num_classes, model.in_chans) == (64, 8, 10, 1)
    x, labels = images(16), torch.arange(16) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + auxiliary_losses(model)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    assert (auxiliary_losses(model) > 0) == (tag != "m2mkd")
    load = expert_load(model)
    assert list(load) == [f"blocks.{i}" for i in model.moe_blocks]
    assert all(sum(shares) == pytest.approx(1.0) for shares in load.values())


def test_common_and_own_overrides() -> None:
    model = micro(num_classes=3, img_size=8, in_chans=2, num_experts=6, top_k=3, moe_blocks=[2], expert_drop=0.1)
    assert model(torch.randn(2, 2, 8, 8)).shape == (2, 3)
    moe = model.blocks[2].moe
    assert (moe.gate.num_experts, moe.gate.top_k, moe.experts.drop1.p) == (6, 3, 0.1)
    assert micro(proj_drop_rate=0.2, moe_blocks=[2]).blocks[2].moe.experts.drop1.p == 0.0
    vmoe = micro("every2", router_options={"capacity_factor": 1.5, "batch_priority": True})
    assert vmoe.blocks[1].moe.gate.capacity_factor == 1.5
    assert vmoe.blocks[1].moe.gate.batch_priority
    assert vmoe.blocks[1].moe.gate.noise_std == 1.0
    own = micro("every2", router={"gate": "experts_choose", "capacity_factor": 2.0})
    assert own(images()).shape == (4, 10)


def test_unknown_overrides_and_routers_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="'m2mkd'"):
        micro(router="m2kd")
    with pytest.raises(M2MKDError, match="capacity_faktor"):
        micro(router_options={"capacity_faktor": 1.0})
    with pytest.raises(M2MKDError, match="add up to 6"):
        micro(depth=4, divided_depths=(2, 2, 2))
    with pytest.raises(M2MKDError, match="at least one block"):
        create_model("vmoe_micro.m2mkd", divided_depths=(2, 0))


@pytest.mark.parametrize(
    ("expert_init", "up_std", "down_std"),
    [("trunc_normal", 0.02, 0.02), ("linear", (1 / 96) ** 0.5, (1 / 384) ** 0.5), ("published", None, None)],
)
def test_how_experts_start(expert_init: str, up_std: float | None, down_std: float | None) -> None:
    model = micro(embed_dim=96 // 3, expert_init=expert_init)  # uniform within 1 / sqrt(n) has variance 1 / (3 n)
    experts = model.blocks[0].moe.experts
    stds = [layer.weight.std().item() for layer in (experts.htoh4, experts.h4toh)]
    published = [(1 / (3 * 32 * 128)) ** 0.5] * 2
    wanted = published if up_std is None else [up_std, down_std]
    assert stds == pytest.approx(wanted, rel=0.05)
    assert experts.htoh4.bias.eq(0).all() == (expert_init != "linear")
    first, second = experts.htoh4.weight[:2]
    assert not torch.equal(first, second), "experts start apart"


def test_reinitialising_covers_the_experts() -> None:
    model = micro()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7.0)
    torch.manual_seed(5)
    model.init_weights()
    again = micro()
    torch.manual_seed(5)
    again.init_weights()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)) or "norm" in name, name
    assert model.blocks[0].moe.experts.htoh4.weight.std() < 0.03


def test_stages_are_views_and_follow_replacements() -> None:
    model = micro(divided_depths=(1, 3), depth=None)
    state = model.state_dict()
    assert state["stages.1.blocks.2.moe.experts.htoh4.weight"].data_ptr() == (
        state["blocks.3.moe.experts.htoh4.weight"].data_ptr()
    )
    assert len(list(model.parameters())) == len(list(micro().parameters())), "each parameter counts once"
    model.reset_classifier(7)
    assert model.stages[1].head is model.head
    model.set_input_size(img_size=(24, 24))
    assert model.stages[0].pos_embed is model.pos_embed
    x = torch.randn(2, 1, 24, 24)
    assert torch.equal(model.stages[1](model.stages[0](x)), model(x))
    copied = copy.deepcopy(model)
    assert copied.stages[0].blocks[0] is copied.blocks[0]
    copied.load_state_dict(model.state_dict())


def test_stages_stay_views_when_memory_is_made_for_the_meta_device() -> None:
    with torch.device("meta"):
        model = micro(divided_depths=(1, 3), depth=None, reg_tokens=1)
    stages = list(model.stages)
    model.to_empty(device="cpu")
    assert list(model.stages) == stages
    for name in ("pos_embed", "cls_token", "reg_token"):
        assert model.stages[0].get_parameter(name) is model.get_parameter(name)
    assert len(list(model.parameters())) == len(list(micro(reg_tokens=1).parameters())), "each parameter counts once"
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    x = images()
    torch.testing.assert_close(model.stages[1](model.stages[0](x)), model(x))
    fresh = micro(divided_depths=(1, 3), depth=None, reg_tokens=1)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), model(x))


@pytest.mark.parametrize("move", [lambda model: model.double(), lambda model: model.to(torch.bfloat16), copy.deepcopy])
def test_stages_stay_views_when_the_model_is_moved(move: Callable[[VMoE], VMoE]) -> None:
    model = move(micro(divided_depths=(2, 2), depth=None))
    for name, parameter in model.stages[0].named_parameters():
        assert parameter is model.get_parameter(name)


@pytest.mark.parametrize("divided_depths", [None, (1, 3)])
def test_fastmoe_names_load_and_save(divided_depths: tuple[int, ...] | None) -> None:
    model_depth = 4 if divided_depths is None else None
    model = micro(divided_depths=divided_depths, depth=model_depth)
    state = fastmoe_state_dict(model)
    assert state["blocks.2.moe.experts.3.htoh4.weight"].shape == (1, 64, 16)
    assert state["blocks.2.moe.experts.3.h4toh.bias"].shape == (1, 16)
    assert not any("experts.h" in name for name in state)
    assert ("stages.1.blocks.1.moe.experts.3.htoh4.weight" in state) == (divided_depths is not None)
    other = create_model("vmoe_micro.m2mkd", embed_dim=16, depth=4)
    other.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("stages.")})
    assert torch.equal(other(images()), model(images()))
    fresh = create_model("vmoe_micro.m2mkd", embed_dim=16, depth=model_depth, divided_depths=divided_depths)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(images()), model(images()))


@pytest.mark.parametrize("tag", ["m2mkd", "every2"])
def test_splits_bit_for_bit(tag: str) -> None:
    model = micro(tag).eval()
    verify_split(model, split(model, [1, 2, 1]), images())


def test_evaluation_takes_any_batch_and_does_not_depend_on_it() -> None:
    """V-MoE's factor in evaluation gives every token a slot, so groups and neighbours do not matter."""
    model = micro("every2").eval()
    x = images(11)
    torch.testing.assert_close(model(x)[:3], model(x[:3]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tag", ["m2mkd", "every2"])
def test_gradient_checkpointing_changes_nothing(tag: str) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = micro(tag).train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(2)
        (model(images(8)).square().sum() + auxiliary_losses(model)).backward()
        return [parameter.grad for parameter in model.parameters()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    model = micro(depth=2).eval()
    x = images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_activation_can_be_a_layer() -> None:
    model = micro(act_layer=partial(nn.GELU, approximate="tanh"))
    assert model.blocks[0].moe.experts.activation == "gelu_tanh"


def test_experts_can_have_an_activation_of_their_own() -> None:
    model = micro("every2", expert_act_layer="swiglu")
    assert model.blocks[1].moe.experts.activation == "swiglu"
    assert model.blocks[1].moe.experts.htoh4.weight.shape == (4, 2 * 64, 16)
    assert type(model.blocks[0].mlp.act).__name__ == "GELUTanh"
    assert model(images()).shape == (4, 10)


def test_router_presets_are_arguments_of_the_layer() -> None:
    for options in ROUTERS.values():
        assert isinstance(VisionMoE(8, **options), VisionMoE)
