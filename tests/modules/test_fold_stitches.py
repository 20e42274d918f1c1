from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.modules.assemble import assemble
from m2mkd_fast.modules.fold_stitches import fold_stitches
from m2mkd_fast.modules.state import load_module, save_module, weights_hash
from m2mkd_fast.modules.student import student_modules
from m2mkd_fast.nn.cut import Cut
from m2mkd_fast.nn.folded_stitch import FoldedStitch
from m2mkd_fast.nn.stitch import LinearStitch, Stitch

WIDTHS = [24, 40, 12]  # wider than the students and narrower


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)


def students(kind: str, seed: int = 0) -> list[nn.Module]:
    """Modules of 4 slots in float64, none of whose parameters is what it starts as."""
    torch.manual_seed(seed)
    if kind == "circuit":
        modules = student_modules(create_model("nac_micro.ring"), None, WIDTHS, tokens=5)
    else:
        options = {"embed_dim": 16, "num_heads": 2, "depth": 5}
        modules = student_modules(create_model(kind, **options), [1, 2, 1, 1], WIDTHS)
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return [module.double().eval() for module in modules]


@pytest.mark.parametrize("kind", ["vit_micro", "vmoe_micro.m2mkd", "circuit"])
def test_the_folded_chain_is_the_kept_one(kind: str) -> None:
    modules = students(kind)
    before = [weights_hash(module) for module in modules]
    kept, folded = (assemble(modules, stitches=stitches) for stitches in ("kept", "folded"))
    torch.testing.assert_close(folded.model(images()), kept.model(images()), rtol=1e-12, atol=1e-12)
    assert [weights_hash(module) for module in modules] == before
    assert folded.origins.keys() == folded.model.state_dict().keys()
    assert folded.model.num_classes == 10
    assert not any("pre_stitch" in name for name in folded.origins)
    stitches = [m for m in folded.model.modules() if isinstance(m, FoldedStitch | Stitch)]
    assert len(stitches) == (0 if kind == "circuit" else 3)
    for parameter in folded.model.parameters():
        assert not any(parameter is other for module in modules for other in module.parameters())


@pytest.mark.parametrize("tokens", [1, 17])
def test_a_circuits_latents_need_not_be_as_many_as_the_teachers_tokens(tokens: int) -> None:
    torch.manual_seed(0)
    teacher = [Cut(width, "tokens", (4, 4), prefix=1) for width in WIDTHS]
    modules = student_modules(create_model("nac_micro.ring"), None, teacher, tokens=tokens)
    modules = [module.double().eval() for module in modules]
    kept, folded = (assemble(modules, stitches=stitches).model for stitches in ("kept", "folded"))
    torch.testing.assert_close(folded(images()), kept(images()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["vmoe_micro.m2mkd", "circuit"])
def test_float32_differs_by_rounding(kind: str) -> None:
    modules = [module.float() for module in students(kind)]
    kept, folded = (assemble(modules, stitches=stitches).model for stitches in ("kept", "folded"))
    x = images(torch.float32)
    torch.testing.assert_close(folded(x), kept(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["vmoe_micro.m2mkd", "circuit"])
def test_it_is_saved_and_loaded_strictly(kind: str, tmp_path) -> None:
    source = assemble(students(kind), stitches="folded").model
    path = tmp_path / "folded.safetensors"
    save_module(path, source, {})
    target = assemble(students(kind, seed=1), stitches="folded").model
    load_module(path, target)
    assert torch.equal(target(images()), source(images()))
    with pytest.raises(M2MKDError, match="unexpected"):
        load_module(path, assemble(students(kind, seed=1), stitches="kept").model)


@pytest.mark.parametrize("kind", ["vit_micro", "circuit"])
def test_gradients_reach_every_module_through_the_folded_stitches(kind: str) -> None:
    model = assemble(students(kind), stitches="folded").model
    model(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model[0].post_stitch is not None and model[1].pre_stitch is None


def test_folded_stitches_are_smaller_where_the_teacher_is_wider() -> None:
    def size(stitches: str) -> int:
        model = assemble(students("vit_micro"), stitches=stitches).model
        return sum(p.numel() for name, p in model.named_parameters() if "_stitch." in name and p.ndim == 2)

    assert size("kept") == 2 * 16 * sum(WIDTHS)
    assert size("folded") == 2 * 16 * (16 + 16 + 12)


def test_modules_without_stitches_stay_as_they_are() -> None:
    modules = students("vit_micro")[:1]
    modules[0].post_stitch = None
    (folded,) = fold_stitches(modules)
    assert weights_hash(folded) == weights_hash(modules[0])


def test_what_cannot_be_folded_is_named() -> None:
    modules = students("vit_micro")
    modules[2].pre_stitch = None
    with pytest.raises(M2MKDError, match="module 1 has a stitch at the cut between modules 1 and 2, module 2 has none"):
        fold_stitches(modules)
    modules = students("vit_micro")
    modules[0].post_stitch = nn.Linear(16, 24)
    with pytest.raises(
        M2MKDError, match="the cut between modules 0 and 1: no way is known to fold a Linear and a Stit"
    ):
        fold_stitches(modules)
    modules = students("vit_micro")
    with pytest.raises(M2MKDError, match="cut between modules 0 and 1: a stitch that gives .*24.* reads .*40"):
        fold_stitches([modules[0], modules[2]])
    modules = students("vit_micro")
    with pytest.raises(M2MKDError, match="leave `into` out"):
        assemble(modules, into=nn.Identity(), stitches="folded")


class End(nn.Module):
    """A module that is nothing but a linear stitch at one side."""

    def __init__(self, side: str, stitch: LinearStitch) -> None:
        super().__init__()
        self.pre_stitch = self.post_stitch = None
        setattr(self, f"{side}_stitch", stitch)

    def forward(self, x: Tensor) -> Tensor:
        for stitch in (self.pre_stitch, self.post_stitch):
            x = x if stitch is None else stitch(x)
        return x


def linear_ends(source: Cut, middle: Cut, target: Cut) -> list[nn.Module]:
    torch.manual_seed(0)
    first, second = LinearStitch(6, 24, source, middle), LinearStitch(24, 5, middle, target)
    return [End("post", first.double()), End("pre", second.double())]


@pytest.mark.parametrize("first_resamples", [True, False])
def test_linear_stitches_of_maps_fold_where_features_are_resampled_once(first_resamples: bool) -> None:
    source = Cut(6, "channels_first", (4, 4) if first_resamples else (3, 5))
    middle = Cut(24, "channels_last", (3, 5))
    target = Cut(5, "tokens", (3, 5) if first_resamples else (2, 2))
    kept = linear_ends(source, middle, target)
    folded = fold_stitches(kept)
    x = torch.randn(2, 6, *source.grid, dtype=torch.float64)
    torch.testing.assert_close(folded[1](folded[0](x)), kept[1](kept[0](x)), rtol=1e-12, atol=1e-12)
    assert folded[1].pre_stitch is None


def test_linear_stitches_that_resample_twice_are_refused() -> None:
    cuts = Cut(6, "channels_first", (4, 4)), Cut(24, "channels_last", (3, 5)), Cut(5, "tokens", (2, 2))
    with pytest.raises(M2MKDError, match="features are resampled twice, from channels-first maps of width 6 on a grid"):
        fold_stitches(linear_ends(*cuts))
