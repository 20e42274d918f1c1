"""Numbers as people read them: one unit per column or axis, so that neighbours compare at a glance."""

from __future__ import annotations

from collections.abc import Iterable
from math import floor, log10
from typing import NamedTuple

_FLOP_UNITS = ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
_TIME_UNITS = ((86400 * 3.0, "days", 86400.0), (3600 * 3.0, "h", 3600.0), (60 * 5.0, "min", 60.0))

MISSING = "-"


class Unit(NamedTuple):
    """`value / divisor` is the figure to show beside `name`."""

    name: str
    divisor: float

    def figure(self, value: float | None, digits: int = 3) -> str:
        return MISSING if value is None else significant(value / self.divisor, digits)

    def text(self, value: float | None, digits: int = 3) -> str:
        return MISSING if value is None else f"{significant(value / self.divisor, digits)} {self.name}"


def flop_unit(values: Iterable[float | None]) -> Unit:
    """The unit in which the largest value is at least 1."""
    largest = max((value for value in values if value), default=0.0)
    for size, name in _FLOP_UNITS:
        if largest >= size:
            return Unit(name, size)
    return Unit("FLOP", 1.0)


def time_unit(values: Iterable[float | None]) -> Unit:
    """Seconds up to five minutes, then minutes to three hours, hours to three days, days."""
    largest = max((value for value in values if value), default=0.0)
    for threshold, name, divisor in _TIME_UNITS:
        if largest >= threshold:
            return Unit(name, divisor)
    return Unit("s", 1.0)


def significant(value: float, digits: int = 3) -> str:
    """`value` in `digits` significant digits, never an exponent: 1234.5 -> 1234, 0.01234 -> 0.0123."""
    if value == 0:
        return "0"
    decimals = digits - 1 - floor(log10(abs(value)))
    return f"{value:.{min(max(decimals, 0), 12)}f}"


def accuracy_text(value: float | None) -> str:
    """Accuracy in per cent with one decimal, without the sign (it stands in the column's head)."""
    return MISSING if value is None else f"{value:.1f}"


def difference_text(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.1f}"


def join_words(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
