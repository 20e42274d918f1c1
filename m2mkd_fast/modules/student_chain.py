"""Assembled students as models with a name, so that they are saved and made again like any other model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.blueprint import Blueprint, from_json
from m2mkd_fast.models.registry import create_model, register_model
from m2mkd_fast.modules.assemble import assemble
from m2mkd_fast.modules.student import student_modules
from m2mkd_fast.nn.cut import Cut


def _chain(
    stitches: str,
    *,
    student: Blueprint | Mapping[str, Any] | None = None,
    parts: int | str | Sequence[int] | None = None,
    cuts: Sequence[int | Mapping[str, Any]] = (),
    tokens: int = 1,
) -> nn.Module:
    """A chain of student modules with fresh weights; the arguments are those of `student_modules`.

    Args:
        stitches: as in `assemble`.
        student: the whole student's blueprint, or `{"name": ..., "options": {...}}`.
        cuts: widths, or the fields of a :class:`~m2mkd_fast.nn.cut.Cut`.
    """
    if student is None:
        raise M2MKDError(
            f"chain.{stitches} is a student's modules with their stitches; it needs student={{'name': ..., 'options': "
            "...}, parts and cuts, which saved models bring along"
        )
    if not isinstance(student, Blueprint):
        student = from_json(student, f"chain.{stitches}: student")
    # No module holds a circuit's signatures.
    unfitted = {"fit_signatures": False} if student.name.startswith("nac_") else {}
    model = create_model(student.name, **{**student.options, **unfitted})
    places = [cut if isinstance(cut, int) else _cut(cut) for cut in cuts]
    return assemble(student_modules(model, parts, places, tokens=tokens), stitches=stitches).model


for _stitches in ("kept", "folded"):
    register_model(f"chain.{_stitches}")(partial(_chain, _stitches))


def _cut(fields: Mapping[str, Any]) -> Cut:
    grid = fields.get("grid")
    try:
        return Cut(**{**fields, "grid": None if grid is None else tuple(grid)})
    except TypeError as error:
        raise M2MKDError(f"{dict(fields)} is no cut ({error}); a cut has width, layout, grid and prefix") from error
