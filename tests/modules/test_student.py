from __future__ import annotations

import pytest
import torch
from small_models import small
from torch import nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.models.vmoe import VMoE
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.modules.meta import check_compatible, hybrid, meta_model
from m2mkd_fast.modules.split import split
from m2mkd_fast.modules.state import is_stitch, load_strict
from m2mkd_fast.modules.student import student_modules
from m2mkd_fast.nn.cut import Cut


def vit(**overrides: object) -> nn.Module:
    torch.manual_seed(0)
    return create_model("vit_micro", **{"embed_dim": 16, "num_heads": 2, "depth": 6, **overrides})


def test_modules_are_stitched_independent_copies() -> None:
    model = vit()
    modules = student_modules(model, [1, 3, 2], [24, 40])
    assert [(module.in_width, module.out_width) for module in modules] == [(None, 24), (24, 40), (40, None)]
    assert [module.depth for module in modules] == [1, 3, 2]
    assert [module.slot for module in modules] == [0, 1, 2]
    memory = {parameter.data_ptr() for parameter in model.parameters()}
    for module, part in zip(modules, split(model, [1, 3, 2]), strict=True):
        own = {name: tensor for name, tensor in module.state_dict().items() if not is_stitch(name)}
        assert own.keys() == part.state_dict().keys()
        assert all(torch.equal(own[name], tensor) for name, tensor in part.state_dict().items())
        assert memory.isdisjoint(parameter.data_ptr() for parameter in module.parameters())
    assert not any(is_stitch(name) for name in model.state_dict())


def test_each_fits_its_slot_of_a_meta_model() -> None:
    meta = meta_model(split(vit(embed_dim=24), 3))
    images = torch.randn(2, 1, 16, 16)
    for index, module in enumerate(student_modules(vit(), 3, meta.widths)):
        logits = hybrid(meta, index, module)(images)
        assert logits.shape == (2, 10)
        logits.square().sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())


def test_mixture_students_have_their_stitches_inside_blocks() -> None:
    model = create_model("vmoe_micro.m2mkd", embed_dim=16)
    _, middle, _ = student_modules(model, [3, 3, 2], [24, 24])
    stitched = {name.rsplit(".", 2)[0] for name in middle.state_dict() if is_stitch(name)}
    assert stitched == {"blocks.0.pre_stitch", "blocks.2.post_stitch"}
    assert middle(torch.randn(2, 17, 24)).shape == (2, 17, 24)
    assert model.blocks[3].pre_stitch is None, "the full model stays without stitches"


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(M2MKDError, match=r"3 student modules .* with 3 cuts; it needs 4"):
        student_modules(vit(), 3, [24, 24, 24])
    with pytest.raises(M2MKDError, match="no parts"):
        student_modules(vit(), None, [24])


def test_circuits_bring_their_own_modules() -> None:
    meta = meta_model(split(vit(embed_dim=24, depth=4), 4))
    images = torch.randn(2, 1, 16, 16)
    torch.manual_seed(0)
    circuit = create_model("nac_micro.ring")
    modules = student_modules(circuit, None, meta.widths, tokens=17)
    check_compatible(meta, meta, modules)
    assert meta[0](images).shape == modules[0](images).shape, "as many tokens as the teacher, for losses on features"
    for index, module in enumerate(modules):
        assert module.slot == index
        assert hybrid(meta, index, module)(images).shape == (2, 10)
    with pytest.raises(M2MKDError, match="parts 4 given for a circuit"):
        student_modules(circuit, 4, meta.widths)
    wrong = student_modules(create_model("nac_micro.ring", num_classes=3), None, meta.widths)
    with pytest.raises(M2MKDError, match="student module 3 is for this number of classes: 3"):
        check_compatible(meta, meta, wrong)


def test_golden_names_of_published_mixture_students(golden_manifest) -> None:
    with torch.device("meta"):
        modules = student_modules(create_model("vmoe_base.m2mkd"), [3, 3, 3, 3], [1024] * 3)
    for index, published in ((0, "idx0"), (1, "idx1"), (2, "idx1"), (3, "idx-1")):
        (names,) = golden_manifest[f"vmoe_student_base/{published}"]["model_stages"]
        assert {key: list(tensor.shape) for key, tensor in modules[index].state_dict().items()} == names


@pytest.mark.golden_case("m2mkd_vmoe_idx*.safetensors")
def test_golden_hybrid_student(golden_case, read_golden, assert_golden) -> None:
    """A student module with the published weights, inside the published meta model, gives the published logits."""
    metadata, tensors = read_golden(golden_case)
    config, index = metadata["config"], metadata["config"]["teacher_stage"]
    geometry = {"img_size": 16, "patch_size": 4, "num_classes": 5}
    sizes = {name: config["vmoe"][name] for name in ("embed_dim", "num_heads", "mlp_ratio", "num_experts", "top_k")}
    full = VMoE(depth=6, moe_blocks="all", router="m2mkd", **geometry, **sizes).double()
    meta = meta_model(split(create_model("vit_micro", in_chans=3, depth=3, **config["vit"]).double(), 3))
    load_strict(meta, {k.removeprefix("meta/"): v for k, v in tensors.items() if k.startswith("meta/")}, golden_case)
    module = student_modules(full, [2, 2, 2], meta.widths)[index]
    state = {k.removeprefix("student/"): v for k, v in tensors.items() if k.startswith("student/")}
    load_strict(module, state, golden_case, allow_unexpected=["stages.*"])
    assert_golden(hybrid(meta, index, module)(tensors["in/x"]), tensors["out/student_logits"], "out/student_logits")


SHAPE = (1, 16, 16)
MAPS = (Cut(24, "channels_last", (4, 4)), Cut(20, "channels_first", (3, 2)))


@pytest.mark.parametrize(("name", "parts"), [("convnext", [3, 3, 2]), ("swin", [2, 2, 2])])
def test_hierarchical_students_between_maps_of_another_layout(name: str, parts: list[int]) -> None:
    model = small(name)
    modules = student_modules(model, parts, MAPS, image_shape=SHAPE)
    assert ModuleChain(modules).cuts == MAPS
    x = torch.randn(2, *SHAPE)
    for module, shape in zip(modules, [(2, 4, 4, 24), (2, 20, 3, 2), (2, 10)], strict=True):
        x = module(x)
        assert x.shape == shape
    x.square().sum().backward()
    assert all(parameter.grad is not None for module in modules for parameter in module.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    stitches = {name.split(".")[0] for module in modules for name in module.state_dict() if is_stitch(name)}
    assert stitches == {"pre_stitch", "post_stitch"}
    own = {name for module in modules for name in module.state_dict() if not is_stitch(name)}
    assert own == model.state_dict().keys(), "the model's own names"


def test_transformer_students_of_a_teacher_with_maps() -> None:
    """The class token of the student, which the teacher has not, is made of the map's mean and left out again."""
    modules = student_modules(vit(), 3, MAPS)
    x = torch.randn(2, *SHAPE)
    for module, shape in zip(modules, [(2, 4, 4, 24), (2, 20, 3, 2), (2, 10)], strict=True):
        x = module(x)
        assert x.shape == shape
    maps = torch.randn(2, 4, 4, 24)
    read = modules[1].pre_stitch(maps)
    same = modules[1].pre_stitch.fc(modules[1].pre_stitch.ln(maps.mean((1, 2))))
    assert read.shape == (2, 17, 16)
    torch.testing.assert_close(read[:, 0], same)


def test_teachers_with_another_patch_grid_are_resampled_to_the_students() -> None:
    meta = meta_model(split(vit(img_size=24, embed_dim=24), 3))
    assert meta.cuts[0] == Cut(24, "tokens", (6, 6), 1)
    modules = student_modules(vit(img_size=24, patch_size=6), 3, meta.cuts)
    images = torch.randn(2, 1, 24, 24)
    for index, module in enumerate(modules):
        assert hybrid(meta, index, module)(images).shape == (2, 10)
        assert meta.run(images, 0, index + 1).shape == module(meta.run(images, 0, index)).shape
