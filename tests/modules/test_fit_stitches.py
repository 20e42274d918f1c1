from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.modules.assemble import assemble
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.modules.fit_stitches import StitchFit, fit_stitches
from m2mkd_fast.modules.meta import meta_model
from m2mkd_fast.modules.split import split
from m2mkd_fast.modules.state import is_stitch, weights_hash
from m2mkd_fast.modules.stitches import stitch_of
from m2mkd_fast.modules.student import student_modules

SLOTS = 4
BOTH = ("pre", "post")


def teacher_chain(seed: int = 0) -> ModuleChain:
    torch.manual_seed(seed)
    return split(create_model("vit_micro", embed_dim=24, num_heads=2, depth=SLOTS), SLOTS)


def students(kind: str, teacher: ModuleChain, seed: int = 1) -> list[nn.Module]:
    torch.manual_seed(seed)
    if kind == "circuit":
        return student_modules(create_model("nac_micro.ring"), None, teacher.widths, tokens=17)
    return student_modules(create_model(kind, embed_dim=16, num_heads=2, depth=SLOTS), SLOTS, teacher.widths)


def batches(count: int = 3, size: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 1, 16, 16, generator=generator) for _ in range(count)]


def variance_explained(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.flatten(0, -2).double(), wanted.flatten(0, -2).double()
    return 1 - ((got - wanted).square().sum() / (wanted - wanted.mean(dim=0)).square().sum()).item()


@pytest.mark.parametrize("kind", ["vit_micro", "vmoe_micro.m2mkd", "circuit"])
def test_each_stitch_explains_what_it_says(kind: str) -> None:
    teacher = teacher_chain()
    modules = students(kind, teacher)
    fresh = copy.deepcopy(modules)
    fits = fit_stitches(modules, teacher, batches(), sides=BOTH)
    sides = [(slot, side) for slot in range(SLOTS) for side in ("pre", "post")]
    assert [(fit.slot, fit.side) for fit in fits] == sides[1:-1]
    assert {fit.positions for fit in fits} == {3 * 24 * 17}

    x = torch.cat(batches())
    own, measured = x, {}
    for slot, module in enumerate(copy.deepcopy(modules)):
        given = teacher.run(x, 0, slot)
        pre, post = stitch_of(module.eval(), "pre"), stitch_of(module, "post")
        if pre is not None:
            measured[slot, "pre"] = variance_explained(pre(given), own)
        if post is not None:
            measured[slot, "post"] = variance_explained(module(given), teacher.run(x, 0, slot + 1))
        for part in module.modules():
            for side in ("pre", "post"):
                if getattr(part, f"{side}_stitch", None) is not None:
                    setattr(part, f"{side}_stitch", None)
        own = module(own)
    for fit in fits:
        assert fit.explained == pytest.approx(measured[fit.slot, fit.side], abs=1e-4)
        assert 0 < fit.explained <= 1

    for module, untouched in zip(modules, fresh, strict=True):
        for name, tensor in module.state_dict().items():
            changed = not torch.equal(tensor, untouched.state_dict()[name])
            assert changed == (is_stitch(name) and ".ln." not in name), name
        assert module.training


def test_it_is_the_ridge_regression() -> None:
    teacher = teacher_chain().double()
    modules = [module.double() for module in students("vit_micro", teacher)]
    images = [batch.double() for batch in batches()]
    with torch.no_grad():
        modules[1].pre_stitch.ln.weight.fill_(3.0)
    fits = fit_stitches(modules, teacher, images, slots=[1], sides=BOTH, ridge=0.01)
    assert [fit.side for fit in fits] == ["pre", "post"]
    x = torch.cat(images)
    with torch.no_grad():
        modules[0].post_stitch = None
        wanted = modules[0].eval()(x).flatten(0, -2)
        features = functional.layer_norm(teacher.run(x, 0, 1), (24,)).flatten(0, -2)
    # The penalty as rows of its own beneath the centred features: the textbook's form, solved by QR.
    centred, mean = features - features.mean(dim=0), wanted.mean(dim=0)
    penalty = (0.01 * centred.square().sum() / 24).sqrt() * torch.eye(24).double()
    rows, right = torch.cat([centred, penalty]), torch.cat([wanted - mean, torch.zeros(24, 16).double()])
    solution = torch.linalg.lstsq(rows, right).solution
    stitch = modules[1].pre_stitch
    torch.testing.assert_close(stitch.fc.weight.T, solution, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(stitch.fc.bias, mean - features.mean(dim=0) @ solution, rtol=1e-9, atol=1e-11)
    assert torch.equal(stitch.ln.weight, torch.ones(24).double())


@pytest.mark.parametrize(("patch_size", "class_token"), [(8, True), (2, False)])
def test_sides_with_other_grids_and_tokens_are_paired_where_they_meet(patch_size: int, class_token: bool) -> None:
    teacher = teacher_chain()
    torch.manual_seed(1)
    options = {"patch_size": patch_size, "class_token": class_token, "global_pool": "token" if class_token else "avg"}
    student = create_model("vit_micro", embed_dim=16, num_heads=2, depth=SLOTS, **options)
    modules = student_modules(student, SLOTS, teacher.cuts)
    fits = fit_stitches(modules, teacher, batches(2), sides=BOTH)
    tokens = (16 // patch_size) ** 2 + class_token
    assert {(fit.side, fit.positions) for fit in fits} == {("pre", 48 * tokens), ("post", 48 * 17)}
    x = torch.cat(batches(2))
    with torch.no_grad():
        explained = variance_explained(modules[0].eval()(x), teacher.run(x, 0, 1))
    assert fits[0].explained == pytest.approx(explained, abs=1e-4)


def test_hierarchical_models_are_fitted_and_folded_map_by_map() -> None:
    def convolutional(*dims: int) -> nn.Module:
        return timm.create_model("convnext_atto", num_classes=10, in_chans=1, depths=(1, 1, 1, 1), dims=dims)

    torch.manual_seed(0)
    teacher = split(convolutional(16, 24, 32, 40), 3, image_shape=(1, 32, 32))
    modules = student_modules(convolutional(8, 12, 16, 20), 3, teacher.cuts, image_shape=(1, 32, 32))
    x = functional.interpolate(batches(1)[0], scale_factor=2)
    fits = fit_stitches(modules, teacher, [x], sides=BOTH)
    positions = [len(x) * cut.tokens for cut in teacher.cuts]
    assert [(fit.slot, fit.side, fit.positions) for fit in fits] == [
        (0, "post", positions[0]),
        (1, "pre", positions[0]),
        (1, "post", positions[1]),
        (2, "pre", positions[1]),
    ]
    assert all(0 < fit.explained <= 1 for fit in fits)
    modules = [module.double().eval() for module in modules]
    kept, folded = (assemble(modules, stitches=stitches).model for stitches in ("kept", "folded"))
    torch.testing.assert_close(folded(x.double()), kept(x.double()), rtol=1e-12, atol=1e-12)
    assert folded.widths == (12, 16)


def test_what_is_not_asked_for_stays_random() -> None:
    teacher = teacher_chain()
    modules, fresh = students("circuit", teacher), students("circuit", teacher)
    for module, untouched in zip(modules, fresh, strict=True):
        module.load_state_dict(untouched.state_dict())
    fits = fit_stitches(modules, teacher, batches(1))
    assert [(fit.slot, fit.side) for fit in fits] == [(0, "post"), (1, "post"), (2, "post")]
    for module, untouched in zip(modules, fresh, strict=True):
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, untouched.state_dict()[name]) == (not name.startswith("post_stitch.")), name


def test_batches_are_summed_as_one_and_a_larger_ridge_explains_less() -> None:
    teacher = teacher_chain()

    def fitted(images: list[Tensor], ridge: float = 1e-3) -> tuple[list[nn.Module], list[StitchFit]]:
        modules = students("vmoe_micro.m2mkd", teacher)
        return modules, fit_stitches(modules, teacher, images, sides=BOTH, ridge=ridge)

    images = batches()
    apart, several = fitted(images)
    together, one = fitted([torch.cat(images)])
    for a, b in zip(apart, together, strict=True):
        for name, tensor in a.state_dict().items():
            torch.testing.assert_close(tensor, b.state_dict()[name], rtol=1e-4, atol=1e-5)
    again, same = fitted(images)
    assert [weights_hash(module) for module in again] == [weights_hash(module) for module in apart]
    assert same == several
    weaker = fitted(images, ridge=1.0)[1]
    for fit, other in zip(several, weaker, strict=True):
        assert other.explained < fit.explained
    assert [fit.positions for fit in several] == [fit.positions for fit in one]


def test_the_meta_models_features_may_be_the_prefix() -> None:
    teacher = teacher_chain()
    meta = meta_model(teacher)
    modules, others = students("vit_micro", teacher), students("vit_micro", teacher)
    fit_stitches(modules, teacher, batches(), slots=[2], sides=BOTH, prefix=meta)
    (pre, post) = fit_stitches(others, teacher, batches(), slots=[2], sides=BOTH)
    assert (pre.slot, post.slot) == (2, 2)
    assert not torch.equal(modules[2].pre_stitch.fc.weight, others[2].pre_stitch.fc.weight)
    assert torch.equal(modules[1].pre_stitch.fc.weight, others[1].pre_stitch.fc.weight)
    x = torch.cat(batches())
    with torch.no_grad():
        given = meta.eval().run(x, 0, 2)
        explained = variance_explained(modules[2].eval()(given), teacher.run(given, 2, 3))
    assert explained > 0.5
    assert meta.training is False


def test_modes_are_given_back_and_no_random_number_is_drawn() -> None:
    teacher = teacher_chain()
    modules = students("vmoe_micro.m2mkd", teacher)
    teacher[1].eval()
    modules[0].blocks[0].eval()
    before = [part.training for module in (*modules, teacher) for part in module.modules()]
    state = torch.get_rng_state()
    fit_stitches(modules, teacher, batches(1))
    assert [part.training for module in (*modules, teacher) for part in module.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_features_that_never_change_leave_the_mean() -> None:
    teacher = teacher_chain()
    modules = students("vit_micro", teacher)
    with torch.no_grad():
        for parameter in teacher[0].parameters():
            parameter.zero_()
    pre, _ = fit_stitches(modules, teacher, batches(), slots=[1], sides=BOTH)
    assert torch.equal(modules[1].pre_stitch.fc.weight, torch.zeros(16, 24))
    assert pre.explained == pytest.approx(0.0, abs=1e-9)


def test_what_cannot_be_fitted_is_named() -> None:
    teacher = teacher_chain()
    modules = students("circuit", teacher)
    with pytest.raises(M2MKDError, match="no images"):
        fit_stitches(modules, teacher, [])
    with pytest.raises(M2MKDError, match="3 student modules, a teacher of 4"):
        fit_stitches(modules[:3], teacher, batches(1))
    with pytest.raises(M2MKDError, match="module index 4 is not in 0..3"):
        fit_stitches(modules, teacher, batches(1), slots=[4])
    with pytest.raises(UnknownNameError, match="unknown side 'poste'; did you mean 'post'"):
        fit_stitches(modules, teacher, batches(1), sides=["poste"])
    for ridge in (0.0, -1.0, float("nan")):
        with pytest.raises(M2MKDError, match="ridge is .*must be positive"):
            fit_stitches(modules, teacher, batches(1), ridge=ridge)
    torch.manual_seed(0)
    published = student_modules(create_model("nac_micro.ring"), None, teacher.widths, tokens=1)
    with pytest.raises(M2MKDError, match=r"the post-stitch of module 0 reads \[1\] positions where \[17\] are wanted"):
        fit_stitches(published, teacher, batches(1))
    modules[1].pre_stitch = nn.Sequential(modules[1].pre_stitch)
    with pytest.raises(M2MKDError, match="the pre-stitch of module 1 is a Sequential"):
        fit_stitches(modules, teacher, batches(1), sides=["pre"])
    modules = students("vit_micro", teacher)
    with torch.no_grad():
        teacher[0].blocks[0].norm1.bias.fill_(float("nan"))
    with pytest.raises(M2MKDError, match="features of the post-stitch of module 0 are not finite"):
        fit_stitches(modules, teacher, batches(1))
