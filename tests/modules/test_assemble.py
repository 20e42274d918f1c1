from __future__ import annotations

import pytest
import torch
from small_models import small
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.modules.assemble import assemble
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.modules.split import split, verify_split
from m2mkd_fast.modules.state import is_stitch, load_strict, weights_hash
from m2mkd_fast.modules.student import student_modules

IMAGES = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def vit(seed: int = 0, **overrides: object) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("vit_micro", **{"embed_dim": 16, "num_heads": 2, "depth": 6, **overrides})


def mixture(seed: int = 0, **overrides: object) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("vmoe_micro.m2mkd", **{"embed_dim": 16, "divided_depths": [4, 4], **overrides}).eval()


def circuit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("nac_micro.ring").eval()


@pytest.mark.parametrize(("build", "parts"), [(vit, [1, 3, 2]), (mixture, [3, 3, 2])])
def test_dropped_stitches_give_the_students_own_model_back(build, parts: list[int]) -> None:
    source, target = build(seed=1), build(seed=2)
    modules = student_modules(source, parts, [24, 24])
    assembly = assemble(modules, into=target)
    assert assembly.model is target
    assert weights_hash(target) == weights_hash(source)
    assert torch.equal(target(IMAGES), source(IMAGES))
    assert assembly.initial == ()
    assert assembly.origins.keys() == target.state_dict().keys()
    for name, origin in assembly.origins.items():
        slot, key = origin.removeprefix("slot ").split(": ")
        assert torch.equal(modules[int(slot)].state_dict()[key], target.state_dict()[name])
        assert not is_stitch(key)


def test_taught_values_and_not_the_initial_ones_arrive() -> None:
    modules = student_modules(vit(), 3, [24, 24])
    with torch.no_grad():
        for slot, module in enumerate(modules):
            for parameter in module.parameters():
                parameter.fill_(slot + 1.0)
    assembly = assemble(modules, into=vit(), stitches="dropped")
    assert assembly.origins["blocks.2.mlp.fc1.weight"] == "slot 1: blocks.0.mlp.fc1.weight"
    assert assembly.model.blocks[2].mlp.fc1.weight.eq(2.0).all()
    assert assembly.model.head.weight.eq(3.0).all()
    assert assembly.model.pos_embed.eq(1.0).all()


def test_kept_stitches_make_a_chain_of_the_modules_themselves() -> None:
    modules = student_modules(vit(), 3, [24, 40])
    assembly = assemble(modules, stitches="kept")
    assert isinstance(assembly.model, ModuleChain)
    assert assembly.model[:] == modules
    assert assembly.model.widths == (24, 40)
    assert torch.equal(assembly.model(IMAGES), modules[2](modules[1](modules[0](IMAGES))))
    assert assembly.origins["stages.1.blocks.0.norm1.weight"] == "slot 1: blocks.0.norm1.weight"
    assert assembly.origins["stages.1.pre_stitch.fc.weight"] == "slot 1: pre_stitch.fc.weight"
    assert assembly.origins.keys() == assembly.model.state_dict().keys()


def test_what_does_not_fit_is_named_with_its_slot_and_nothing_changes() -> None:
    target = vit(mlp_ratio=2.0)
    before = weights_hash(target)
    with pytest.raises(M2MKDError) as error:
        assemble(student_modules(vit(), 3, [24, 24]), into=target)
    assert (
        "misshapen blocks.2.mlp.fc1.weight [64, 16] from slot 1: blocks.0.mlp.fc1.weight, the module has [32, 16]"
        in str(error.value)
    )
    assert weights_hash(target) == before


def test_missing_and_unexpected_tensors_are_errors_unless_allowed() -> None:
    modules = student_modules(vit(init_values=0.1), 3, [24, 24])
    target = vit(reg_tokens=1)
    with pytest.raises(M2MKDError) as error:
        assemble(modules, into=target)
    assert "missing reg_token [1, 1, 16]" in str(error.value)
    assert "unexpected slot 1: blocks.0.ls1.gamma [16]" in str(error.value)
    with pytest.raises(M2MKDError, match="misshapen pos_embed"):
        assemble(modules, into=target, strict=False)
    target = vit(reg_tokens=1, no_embed_class=True)
    modules = student_modules(vit(init_values=0.1, class_token=False, global_pool="avg", fc_norm=False), 3, [24, 24])
    with pytest.raises(M2MKDError, match="missing cls_token"):
        assemble(modules, into=target, allow_missing=["reg_token"], allow_unexpected=["*.ls?.gamma"])
    for leave in ({"strict": False}, {"allow_missing": ["*_token"], "allow_unexpected": ["*.ls?.gamma"]}):
        assembly = assemble(modules, into=target, **leave)
        assert set(assembly.initial) == {"reg_token", "cls_token"}
        assert assembly.origins["norm.weight"] == "slot 2: norm.weight"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stitches": "fold"}, "say 'kept', 'folded' or 'dropped'"),
        ({"stitches": "kept", "into": vit()}, "leave `into` out"),
        ({"stitches": "dropped"}, "give `into`"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(M2MKDError, match=message):
        assemble(student_modules(vit(), 3, [24, 24]), **arguments)


def test_modules_out_of_order_or_too_few_are_refused() -> None:
    first, second, third = student_modules(vit(), 3, [24, 24])
    with pytest.raises(M2MKDError, match="module 0 of the list was made for slot 1"):
        assemble([second, first, third], into=vit())
    with pytest.raises(M2MKDError, match="4 blocks together, the model has 6"):
        assemble([first, second], into=vit())
    with pytest.raises(M2MKDError, match="module 0 is a Linear, which has no blocks"):
        assemble([nn.Linear(2, 2)], into=vit())


def test_circuits_are_assembled_around_their_own_graph() -> None:
    source, target = circuit(seed=1), circuit(seed=2)
    modules = student_modules(source, None, [24] * (source.num_modules - 1))
    taught = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    assembly = assemble(modules, into=target)
    assert assembly.model is target
    filled = set(assembly.origins) - set(assembly.initial)
    assert filled
    assert set(assembly.initial)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, (taught if name in filled else before)[name]), name
    graph = ("signatures_", "codes_", "latent_seeder.", "kernel.bandwidth")
    for name in assembly.initial:
        assert any(word in name for word in graph), f"{name} should have come from a module"
    prefix = "latent_graphs.0.propagators.1.ffn."
    ffn = {name: origin for name, origin in assembly.origins.items() if name.startswith(prefix)}
    assert ffn
    assert ffn == {name: "slot 2: ffn." + name.removeprefix(prefix) for name in ffn}


def test_modules_that_do_not_fit_a_circuit_are_named() -> None:
    target = circuit()
    before = weights_hash(target)
    modules = student_modules(circuit(), None, [24] * (target.num_modules - 1))
    with pytest.raises(M2MKDError, match="modules"):
        assemble(modules[:-1], into=target)
    modules[1].extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(M2MKDError, match=r"1 problems: unexpected slot 1: extra"):
        assemble(modules, into=target)
    del modules[1].extra
    modules[1].ffn = nn.Identity()
    with pytest.raises(M2MKDError, match=r"missing latent_graphs\.0\.propagators\.0\.ffn"):
        assemble(modules, into=target)
    assert weights_hash(target) == before


def test_circuit_modules_chain_with_their_stitches_kept() -> None:
    modules = student_modules(circuit(), None, [24, 32, 40], tokens=5)
    chain = assemble(modules, stitches="kept").model.eval()
    assert chain.num_classes == 10
    assert chain(IMAGES).shape == (2, 10)


@pytest.mark.golden_case("m2mkd_vmoe_idx0_*.safetensors")
def test_golden_published_teacher_is_assembled_from_its_stages(golden_case, read_golden) -> None:
    metadata, tensors = read_golden(golden_case)
    config = metadata["config"]
    arguments = {"in_chans": 3, "depth": sum(config["teacher_depths"]), **config["vit"]}
    stages = split(create_model("vit_micro", **arguments).double(), config["teacher_depths"])
    state = {name.removeprefix("teacher/"): tensor for name, tensor in tensors.items() if name.startswith("teacher/")}
    load_strict(stages, state, golden_case)
    assembly = assemble(stages[:], into=create_model("vit_micro", **arguments).double())
    assert assembly.initial == ()
    verify_split(assembly.model, stages, tensors["in/x"])


def test_models_of_any_kind_are_assembled_with_their_statistics() -> None:
    source, target = small("resnet", seed=1), small("resnet", seed=2).eval()
    source(IMAGES)
    source.eval()
    modules = student_modules(source, [3, 2, 2], [24, 24], image_shape=(1, 16, 16))
    assembly = assemble(modules, into=target)
    assert weights_hash(target) == weights_hash(source)
    assert torch.equal(target(IMAGES), source(IMAGES))
    assert assembly.initial == ()
    assert assembly.origins["layer2.0.bn1.running_mean"] == "slot 1: layer2.0.bn1.running_mean"
    chain = assemble(modules, stitches="kept").model.eval()
    assert chain(IMAGES).shape == (2, 10)


class TableBeforeEachBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, 8, 4, 4)
        self.table = nn.Parameter(torch.randn(1, 16, 8))
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4))
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x + self.table)
        return self.head(x.mean(1))


def test_a_tensor_of_several_slots_must_agree() -> None:
    torch.manual_seed(0)
    source, target = TableBeforeEachBlock(), TableBeforeEachBlock()
    modules = student_modules(source, 2, [24], image_shape=(1, 16, 16))
    assert assemble(modules, into=target).origins["table"].endswith(": table")
    assert torch.equal(target(IMAGES), source(IMAGES))
    before = weights_hash(target)
    with torch.no_grad():
        modules[1].get_parameter("table").add_(1.0)
    with pytest.raises(M2MKDError, match=r"different values: table \(slot 0: table and slot 1: table\)"):
        assemble(modules, into=target)
    assert weights_hash(target) == before
