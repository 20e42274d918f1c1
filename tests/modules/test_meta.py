from __future__ import annotations

import pytest
import torch
from small_models import small
from timm.layers import DropPath
from torch import nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.modules.meta import check_compatible, hybrid, meta_model
from m2mkd_fast.modules.split import split
from m2mkd_fast.modules.state import load_strict, weights_hash
from m2mkd_fast.modules.student import student_modules
from m2mkd_fast.nn.cut import Cut


def vit(**overrides: object) -> nn.Module:
    torch.manual_seed(0)
    return create_model("vit_micro", **{"embed_dim": 16, "num_heads": 2, "depth": 6, **overrides})


@pytest.fixture
def teacher() -> ModuleChain:
    return split(vit(drop_path_rate=0.2), 3)


IMAGES = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def test_has_the_teachers_interface_and_the_given_depth(teacher: ModuleChain) -> None:
    for depth, expected in ((1, [1, 1, 1]), ([2, 1, 4], [2, 1, 4])):
        meta = meta_model(teacher, depth)
        assert [stage.depth for stage in meta] == expected
        assert (meta.widths, meta.tokens, meta.num_classes) == (teacher.widths, teacher.tokens, teacher.num_classes)
        assert meta[0].image_shape == teacher[0].image_shape
        assert [stage.slot for stage in meta] == [0, 1, 2]
        names = {name for name in meta.state_dict() if "blocks.0." in name or "blocks." not in name}
        assert names == {name for name in teacher.state_dict() if "blocks.0." in name or "blocks." not in name}
        assert meta(IMAGES).shape == (2, 10)


def test_is_fresh_repeatable_and_independent(teacher: ModuleChain) -> None:
    before = weights_hash(teacher)
    torch.manual_seed(1)
    one = meta_model(teacher)
    torch.manual_seed(1)
    two = meta_model(teacher)
    torch.manual_seed(2)
    three = meta_model(teacher)
    assert weights_hash(one) == weights_hash(two) != weights_hash(three)
    matrices = [name for name, parameter in one.named_parameters() if parameter.ndim > 1]
    assert matrices
    for name in matrices:
        assert not torch.equal(one.get_parameter(name), teacher.get_parameter(name)), name
    one(IMAGES).sum().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert weights_hash(teacher) == before


def test_starts_like_a_model_of_timm(teacher: ModuleChain) -> None:
    """Standard deviations of every kind of tensor are those of a newly built Vision Transformer."""
    wide = {"embed_dim": 96, "num_heads": 4, "depth": 3}
    new = split(vit(**wide), 3)
    trained = split(vit(**wide), 3)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(3.0)
    for (name, parameter), expected in zip(meta_model(trained).named_parameters(), new.parameters(), strict=True):
        assert parameter.mean().item() == pytest.approx(expected.mean().item(), abs=0.02), name
        if expected.numel() > 100:
            assert parameter.std().item() == pytest.approx(expected.std().item(), rel=0.15, abs=1e-9), name


def test_draws_nothing_in_train_mode(teacher: ModuleChain) -> None:
    meta = meta_model(teacher)
    assert meta.training
    assert not any(isinstance(module, DropPath) for module in meta.modules())
    assert torch.equal(meta(IMAGES), meta(IMAGES))


def test_a_frozen_teacher_makes_a_trainable_meta_model(teacher: ModuleChain) -> None:
    teacher.requires_grad_(False).eval()
    assert all(parameter.requires_grad for parameter in meta_model(teacher).parameters())


def test_mixture_teachers_make_mixture_meta_models() -> None:
    teacher = split(create_model("vmoe_micro.m2mkd", embed_dim=16), 4)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.fill_(7.0)
    meta = meta_model(teacher)
    assert all(hasattr(stage.blocks[0], "moe") for stage in meta)
    for name, parameter in meta.named_parameters():
        assert not parameter.eq(7.0).any(), name
    assert meta(IMAGES).shape == (2, 10)


@pytest.mark.parametrize("depth", [0, [1, 1], [1, 0, 1], -1])
def test_depths_that_do_not_fit_are_refused(teacher: ModuleChain, depth: object) -> None:
    with pytest.raises(M2MKDError, match="do not fit a chain of 3"):
        meta_model(teacher, depth)


def test_chains_of_other_kinds_are_refused(teacher: ModuleChain) -> None:
    with pytest.raises(M2MKDError, match="module 0 is a Flatten"):
        meta_model(ModuleChain([nn.Flatten()]))
    with pytest.raises(M2MKDError, match="module 0 has stitches"):
        meta_model(ModuleChain(student_modules(vit(), 3, [24, 24])))
    with pytest.raises(M2MKDError, match="module 0 has stitches"):
        meta_model(ModuleChain(student_modules(create_model("vmoe_micro.m2mkd"), 3, [24, 24])))


def test_hybrid_replaces_one_module_and_shares_all(teacher: ModuleChain) -> None:
    meta = meta_model(teacher)
    mixed = hybrid(meta, 1, teacher[1])
    assert mixed[:] == [meta[0], teacher[1], meta[2]]
    assert torch.equal(mixed(IMAGES), meta[2](teacher[1](meta[0](IMAGES))))
    assert meta[1] is not teacher[1]


def test_hybrid_refuses_what_does_not_fit(teacher: ModuleChain) -> None:
    meta = meta_model(teacher)
    with pytest.raises(M2MKDError, match=r"the last of 3 modules is 2"):
        hybrid(meta, -1, teacher[2])
    with pytest.raises(M2MKDError, match="made for slot 2, not for slot 1"):
        hybrid(meta, 1, teacher[2])
    with pytest.raises(M2MKDError, match="reads tokens of width 24 where the meta model's module 1 reads"):
        hybrid(meta, 1, student_modules(vit(), 3, [24, 16])[1])
    with pytest.raises(M2MKDError, match="for this number of classes: 7, the meta model for 10"):
        hybrid(meta, 2, split(vit(num_classes=7), 3)[2])
    with pytest.raises(M2MKDError, match="images of shape"):
        hybrid(meta, 0, split(vit(in_chans=3), 3)[0])


def test_hybrid_of_a_chain_that_says_little() -> None:
    """A circuit's modules in their own chain, with their stitches, take the place of a meta model as well."""
    torch.manual_seed(0)
    modules = student_modules(create_model("nac_micro.ring"), None, [24, 24, 24])
    chain = ModuleChain(modules)
    other = student_modules(create_model("nac_micro.ring"), None, [24, 24, 24])
    assert hybrid(chain, 0, other[0])[:] == [other[0], *modules[1:]]
    stages = student_modules(vit(depth=4), 4, [24, 24, 24])
    assert hybrid(chain, 0, stages[0])(IMAGES).shape == (2, 10)


def test_compatible_parts_pass(teacher: ModuleChain) -> None:
    students = student_modules(vit(embed_dim=8), 3, teacher.widths)
    check_compatible(teacher, meta_model(teacher), students)


def test_all_that_does_not_fit_is_listed_at_once(teacher: ModuleChain) -> None:
    meta = meta_model(teacher)
    students = student_modules(vit(embed_dim=8, num_classes=3), 3, [16, 24])
    with pytest.raises(M2MKDError) as error:
        check_compatible(teacher, meta, students)
    message = str(error.value)
    assert "student module 1 gives tokens of width 24" in message
    assert "student module 2 reads tokens of width 24" in message
    assert "student module 2 is for this number of classes: 3" in message
    assert "teacher module" not in message
    with pytest.raises(M2MKDError, match="the teacher has 3 modules, the meta model 3 and the student 2"):
        check_compatible(teacher, meta, students[:2])


@pytest.mark.golden_case("m2mkd_vmoe_idx*.safetensors")
def test_golden_hybrid_teacher(golden_case, read_golden, assert_golden) -> None:
    """Meta model and teacher module with the published weights give the published logits."""
    metadata, tensors = read_golden(golden_case)
    config = metadata["config"]
    teacher_depths, meta_depths, index = config["teacher_depths"], config["meta_depths"], config["teacher_stage"]
    model = create_model("vit_micro", in_chans=3, depth=sum(teacher_depths), **config["vit"]).double()
    teacher = split(model, teacher_depths)
    meta = meta_model(teacher, meta_depths)
    for chain, prefix in ((teacher, "teacher/"), (meta, "meta/")):
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        load_strict(chain, state, golden_case)
    mixed = hybrid(meta, index, teacher[index])
    assert_golden(mixed(tensors["in/x"]), tensors["out/teacher_logits"], "out/teacher_logits")
    if index > 0:
        assert_golden(meta.run(tensors["in/x"], 0, index), tensors["out/meta_output"], "out/meta_output")


def test_layouts_and_grids_that_differ_are_listed() -> None:
    """A Vision Transformer's stages do not fit a hierarchical meta model without stitches between the layouts."""
    teacher = split(small("swin"), [2, 2, 2], (1, 16, 16))
    meta = meta_model(teacher)
    students = student_modules(vit(), 3, teacher.cuts)
    check_compatible(teacher, meta, students)
    unfit = [split(vit(), 3)[0], *student_modules(vit(), 3, [12, Cut(12, "channels_last", (4, 4))])[1:]]
    with pytest.raises(M2MKDError) as error:
        check_compatible(teacher, meta, unfit)
    message = str(error.value)
    assert (
        "student module 0 gives tokens of width 16 on a grid of 4x4 behind 1 prefix token where the meta model's "
        "module 0 gives channels-last maps of width 12 on a grid of 8x8" in message
    )
    assert "student module 1 reads tokens of width 12 where" in message
    assert "student module 2 reads channels-last maps of width 12 on a grid of 4x4 where" in message
    assert "teacher module" not in message
