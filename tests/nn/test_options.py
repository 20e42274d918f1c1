from __future__ import annotations

import pytest

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.nn.options import build


class Part:
    def __init__(self, size: int, *, rate: float = 0.5) -> None:
        self.size, self.rate = size, rate


def test_given_options_win_over_defaults() -> None:
    part = build(Part, "part_kwargs", {"rate": 0.1}, size=3, rate=0.2, not_for_this_part=True)
    assert (part.size, part.rate) == (3, 0.1)
    assert build(Part, "part_kwargs", None, size=3).rate == 0.5


def test_misspelt_and_missing_options() -> None:
    with pytest.raises(UnknownNameError, match="key in part_kwargs: 'sizes'; did you mean 'size'"):
        build(Part, "part_kwargs", {"sizes": 3})
    with pytest.raises(M2MKDError, match="part_kwargs has no 'size', which Part needs"):
        build(Part, "part_kwargs", {})
