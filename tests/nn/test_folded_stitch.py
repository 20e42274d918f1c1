from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.cut import Cut
from m2mkd_fast.nn.folded_stitch import FoldedStitch
from m2mkd_fast.nn.stitch import Stitch

TEACHER = Cut(24, "tokens", (4, 4), prefix=1)


def trained(*arguments: object, seed: int = 0, **named: object) -> Stitch:
    """A stitch in float64 none of whose parameters is what it starts as."""
    generator = torch.Generator().manual_seed(seed)
    stitch = Stitch(*arguments, **named).double()
    with torch.no_grad():
        for parameter in stitch.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return stitch


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def agrees(folded: nn.Module, first: nn.Module, second: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(folded(x), second(first(x)), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(0, 9), st.sampled_from([1e-6, 1.0, 1e6]))
def test_fuzz_equals_both_stitches_at_any_widths(student: int, teacher: int, following: int, seed: int, scale: float):
    first, second = trained(student, teacher, seed=seed), trained(teacher, following, seed=seed + 1)
    first.ln.eps, second.ln.eps = 1e-5, 1e-6
    folded = FoldedStitch.of(first, second)
    assert folded.rank == min(student, teacher)
    x = scale * features(2, 3, student)
    expected = second(first(x))
    torch.testing.assert_close(folded(x), expected, rtol=1e-10, atol=1e-11 * expected.abs().max().item())


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_features_without_variance_fold_too(constant: float) -> None:
    first, second = trained(6, 24), trained(24, 5, seed=1)
    agrees(FoldedStitch.of(first, second), first, second, torch.full((2, 6), constant, dtype=torch.float64))
    with torch.no_grad():
        first.fc.weight.zero_()  # the second norm's variance is then the bias's alone
    agrees(FoldedStitch.of(first, second), first, second, features(4, 6))
    with torch.no_grad():
        first.fc.bias.fill_(2.0)
    agrees(FoldedStitch.of(first, second), first, second, features(4, 6))


def test_float32_is_as_close_as_rounding_allows() -> None:
    first, second = trained(48, 64), trained(64, 48, seed=1)
    x = features(32, 17, 48)
    truth = second(first(x))
    first, second = first.float(), second.float()
    ours = (FoldedStitch.of(first, second)(x.float()).double() - truth).abs().max()
    theirs = (second(first(x.float())).double() - truth).abs().max()
    assert ours <= 2 * theirs
    with torch.autocast("cpu", torch.bfloat16):
        ours = (FoldedStitch.of(first, second)(x.float()).double() - truth).square().mean()
        theirs = (second(first(x.float())).double() - truth).square().mean()
    assert ours <= 2 * theirs


CUTS = {
    "tokens": (Cut(6, "tokens", (4, 4), prefix=1), Cut(5, "tokens", (4, 4), prefix=1)),
    "class tokens left out and made again": (Cut(6, "tokens", (4, 4)), Cut(5, "tokens", (4, 4), prefix=2)),
    "another grid at each step": (Cut(6, "tokens", (7, 3)), Cut(5, "tokens", (2, 9), prefix=1)),
    "channels first": (Cut(6, "channels_first", (8, 8)), Cut(5, "channels_first", (3, 4))),
    "channels last to first": (Cut(6, "channels_last", (2, 2)), Cut(5, "channels_first", (4, 4))),
    "channels first to tokens": (Cut(6, "channels_first", (4, 4)), Cut(5, "tokens", (4, 4), prefix=1)),
}


def shape_of(cut: Cut) -> tuple[int, ...]:
    height, width = cut.grid
    return {
        "tokens": (2, cut.prefix + height * width, cut.width),
        "channels_last": (2, height, width, cut.width),
        "channels_first": (2, cut.width, height, width),
    }[cut.layout]


@pytest.mark.parametrize(
    "teacher", [TEACHER, Cut(24, "channels_first", (3, 5)), Cut(24, "channels_last", (4, 4))], ids=str
)
@pytest.mark.parametrize("case", CUTS)
def test_rearrangements_are_carried_along(case: str, teacher: Cut) -> None:
    source, target = CUTS[case]
    first, second = trained(6, 24, source, teacher), trained(24, 5, teacher, target, seed=1)
    folded = FoldedStitch.of(first, second)
    x = features(*shape_of(source))
    agrees(folded, first, second, x)
    assert folded(x).shape == shape_of(target)
    assert (folded.source, folded.target) == (source, target)


def test_tokens_of_any_number() -> None:
    first, second = trained(6, 24, Cut(6), Cut(24)), trained(24, 5, Cut(24), Cut(5), seed=1)
    folded = FoldedStitch.of(first, second)
    for tokens in (1, 9):
        agrees(folded, first, second, features(2, tokens, 6))


def test_tokens_whose_grid_one_side_does_not_know() -> None:
    first = trained(6, 24, Cut(6), Cut(24))
    folded = FoldedStitch.of(first, second := trained(24, 5, TEACHER, Cut(5, "tokens", (4, 4), prefix=1), seed=1))
    agrees(folded, first, second, features(2, 17, 6))
    agrees(folded, first, second, features(2, 1, 6))
    with pytest.raises(M2MKDError, match="cannot be folded"):
        FoldedStitch.of(first, trained(24, 5, TEACHER, Cut(5, "tokens", (2, 2))))


def test_stitches_that_do_not_meet_are_refused() -> None:
    with pytest.raises(M2MKDError, match="a stitch that gives 24 and one that reads 20 cannot be folded"):
        FoldedStitch.of(Stitch(6, 24), Stitch(20, 5))
    with pytest.raises(M2MKDError, match=r"gives tokens of width 24 on a grid of 4x4 .* reads tokens of width 24 on a"):
        FoldedStitch.of(Stitch(6, 24, Cut(6), TEACHER), Stitch(24, 5, Cut(24, "tokens", (2, 8), prefix=1), Cut(5)))


def test_gradients_are_those_of_both_stitches() -> None:
    first, second = trained(6, 24), trained(24, 5, seed=1)
    folded = FoldedStitch.of(first, second)
    x, given = features(3, 6).requires_grad_(), features(3, 5)
    (theirs,) = torch.autograd.grad((second(first(x)) * given).sum(), x)
    ours, *parameters = torch.autograd.grad((folded(x) * given).sum(), [x, *folded.parameters()])
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    assert all(gradient.abs().max() > 0 for gradient in parameters)


def test_device_dtype_and_mode_are_the_first_stitchs() -> None:
    folded = FoldedStitch.of(Stitch(6, 24).bfloat16().eval(), Stitch(24, 5).bfloat16())
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.bfloat16}
    assert not folded.training
    assert list(folded.state_dict()) == ["inner.weight", "inner.bias", "outer.weight", "outer.bias"]


@pytest.mark.slow
def test_compiles_whole() -> None:
    source, target = CUTS["another grid at each step"]
    folded = FoldedStitch.of(trained(6, 24, source, TEACHER), trained(24, 5, TEACHER, target, seed=1))
    x = features(*shape_of(source))
    torch.testing.assert_close(torch.compile(folded, fullgraph=True)(x), folded(x), rtol=1e-10, atol=1e-10)
