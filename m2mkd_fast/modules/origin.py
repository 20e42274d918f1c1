"""What student modules were made from, noted on them, so that their chain can be built again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from m2mkd_fast.models.blueprint import Blueprint, blueprint_of, remember
from m2mkd_fast.nn.cut import Cut

_ATTRIBUTE = "_made_from"


def remember_origin(
    modules: Sequence[nn.Module], model: nn.Module, parts: Any, cuts: Sequence[int | Cut], tokens: int
) -> None:
    """Note on student modules the arguments that `student_modules` made them from, where the model has a blueprint."""
    student = blueprint_of(model)
    if student is None:
        return
    places = [cut if isinstance(cut, int) else dataclasses.asdict(cut) for cut in cuts]
    for module in modules:
        setattr(module, _ATTRIBUTE, {"student": student, "parts": parts, "cuts": places, "tokens": tokens})


def remember_chain(chain: nn.Module, modules: Sequence[nn.Module], stitches: str) -> None:
    """Note on a chain of student modules how it was put together, where all of them were made by one call."""
    origins = [getattr(module, _ATTRIBUTE, None) for module in modules]
    if origins[0] is not None and all(origin == origins[0] for origin in origins):
        remember(chain, Blueprint(f"chain.{stitches}", origins[0]))
