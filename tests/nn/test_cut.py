from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.nn.cut import Cut, as_cut, rearrange

SIDES = st.integers(1, 6)


@st.composite
def cuts(draw, width: int) -> Cut:
    layout = draw(st.sampled_from(["tokens", "channels_last", "channels_first"]))
    prefix = draw(st.integers(0, 2)) if layout == "tokens" else 0
    return Cut(width, layout, (draw(SIDES), draw(SIDES)), prefix)


def shape_of(cut: Cut, batch: int) -> list[int]:
    shapes = {
        "tokens": [batch, cut.tokens, cut.width],
        "channels_last": [batch, *cut.grid, cut.width],
        "channels_first": [batch, cut.width, *cut.grid],
    }
    return shapes[cut.layout]


def as_map(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Channels-first map of the grid, laid out by hand."""
    if cut.layout == "tokens":
        return x[:, cut.prefix :].transpose(1, 2).unflatten(2, cut.grid)
    return x if cut.layout == "channels_first" else x.permute(0, 3, 1, 2)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_fuzz_shapes_constants_and_means(data) -> None:
    source, target = data.draw(cuts(width=3)), data.draw(cuts(width=5))  # the width is not rearranged
    x = torch.randn(shape_of(source, 2), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = rearrange(x, source, target)
    assert list(y.shape) == shape_of(Cut(3, target.layout, target.grid, target.prefix), 2)
    ones = rearrange(torch.ones_like(x), source, target)
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=1e-12, atol=0)
    if all(new <= old for new, old in zip(target.grid, source.grid, strict=True)):
        torch.testing.assert_close(as_map(y, target).mean((2, 3)), as_map(x, source).mean((2, 3)))
    if target.layout == "tokens":
        passed = min(source.prefix, target.prefix)
        if passed:
            assert torch.equal(y[:, :passed], x[:, :passed])
        added = y[:, passed : target.prefix]
        torch.testing.assert_close(added, as_map(x, source).mean((2, 3)).unsqueeze(1).expand_as(added))


@pytest.mark.parametrize("grid", [(8, 12), (5, 7)])
def test_enlarges_as_interpolate_does(grid: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    expected = F.interpolate(x, grid, mode="bilinear", align_corners=False)
    got = rearrange(x, Cut(3, "channels_first", (4, 6)), Cut(3, "channels_first", grid))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_shrinks_by_averages_over_areas() -> None:
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    got = rearrange(x, Cut(3, "channels_first", (8, 6)), Cut(3, "channels_first", (4, 3)))
    torch.testing.assert_close(got, F.avg_pool2d(x, 2), rtol=1e-12, atol=1e-12)
    three = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1)  # cells of 1.5 old ones each
    two = rearrange(three, Cut(1, "tokens", (3, 1)), Cut(1, "tokens", (2, 1)))
    torch.testing.assert_close(two.flatten(), torch.tensor([(1 + 0.5 * 2) / 1.5, (0.5 * 2 + 4) / 1.5]))


def test_what_differs_in_nothing_is_the_same_tensor() -> None:
    x = torch.randn(2, 5, 4)
    assert rearrange(x, Cut(4, "tokens", (2, 2), 1), Cut(9, "tokens", (2, 2), 1)) is x
    assert rearrange(x, Cut(4, "tokens", (7, 7)), Cut(4)) is x, "tokens whose number is taken as it comes"
    maps = torch.randn(2, 4, 3, 3)
    assert rearrange(maps, Cut(4, "channels_first", (3, 3)), Cut(8, "channels_first", (3, 3))) is maps


def test_layouts_hold_the_same_positions() -> None:
    x = torch.randn(2, 6, 4)
    tokens, last = Cut(4, "tokens", (2, 3)), Cut(4, "channels_last", (2, 3))
    first = Cut(4, "channels_first", (2, 3))
    assert torch.equal(rearrange(x, tokens, last), x.view(2, 2, 3, 4))
    assert torch.equal(rearrange(x, tokens, first), x.view(2, 2, 3, 4).permute(0, 3, 1, 2))
    assert torch.equal(rearrange(rearrange(x, tokens, first), first, tokens), x)
    assert torch.equal(rearrange(x.view(2, 2, 3, 4), Cut(4, "channels_last"), Cut(4)), x), "the grid is in the shape"
    assert torch.equal(rearrange(x, Cut(4), last), x.view(2, 2, 3, 4)), "as many tokens as positions"


def test_gradients() -> None:
    x = torch.randn(2, 10, 3, dtype=torch.float64, requires_grad=True)
    source, target = Cut(3, "tokens", (3, 3), 1), Cut(3, "tokens", (2, 4), 2)
    assert torch.autograd.gradcheck(lambda x: rearrange(x, source, target), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_for_any_batch_without_a_break(dtype: torch.dtype) -> None:
    source, target = Cut(3, "tokens", (4, 4), 1), Cut(3, "channels_first", (2, 6))
    compiled = torch.compile(lambda x: rearrange(x, source, target), backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 5):
        x = torch.randn(batch, 17, 3, dtype=dtype)
        assert torch.equal(compiled(x), rearrange(x, source, target))
        assert compiled(x).dtype is dtype


@pytest.mark.parametrize(
    ("shape", "source", "target"),
    [
        ((2, 17, 3), Cut(3, "tokens", (4, 4)), Cut(3, "channels_last", (4, 4))),
        ((2, 16, 4), Cut(3, "tokens", (4, 4)), Cut(3, "channels_last", (4, 4))),
        ((2, 16, 3), Cut(3, "channels_last", (4, 4)), Cut(3)),
        ((2, 3, 4, 5), Cut(3, "channels_first", (4, 4)), Cut(3)),
        ((2, 9, 3), Cut(3), Cut(3, "channels_last", (4, 4))),
        ((2, 9, 3), Cut(3), Cut(3, "channels_last")),
    ],
)
def test_features_that_do_not_fit_are_refused(shape, source: Cut, target: Cut) -> None:
    with pytest.raises(M2MKDError, match=r"given where|without a known grid"):
        rearrange(torch.zeros(shape), source, target)


def test_cuts_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean.*channels_last"):
        Cut(3, "channel_last")
    with pytest.raises(M2MKDError, match="no cut of width 0"):
        Cut(0)
    with pytest.raises(M2MKDError, match="only 'tokens' have a prefix"):
        Cut(3, "channels_last", (2, 2), 1)


def test_agreement_and_description() -> None:
    cut = Cut(24, "tokens", (4, 4), 1)
    assert cut.tokens == 17
    assert str(cut) == "tokens of width 24 on a grid of 4x4 behind 1 prefix token"
    assert cut.agrees_with(as_cut(24))
    assert as_cut(cut) is cut
    for other in (Cut(25, "tokens", (4, 4), 1), Cut(24, "tokens", (4, 4)), Cut(24, "tokens", (4, 2), 1)):
        assert not cut.agrees_with(other)
    assert not as_cut(24).agrees_with(Cut(24, "channels_last"))
