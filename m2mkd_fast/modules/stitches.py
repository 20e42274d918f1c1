"""Where the stitches of a module are, and the module without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import nn

from m2mkd_fast.errors import M2MKDError

Side = Literal["pre", "post"]


def stitch_owner(module: nn.Module, side: Side) -> nn.Module | None:
    """The part of a module that holds its stitch of a side (the module itself, or a block); None without a stitch."""
    name = f"{side}_stitch"
    owners = [part for part in module.modules() if getattr(part, name, None) is not None]
    if len(owners) > 1:
        raise M2MKDError(f"a {type(module).__name__} has {len(owners)} {side}-stitches; a module has one at each side")
    return owners[0] if owners else None


def stitch_of(module: nn.Module, side: Side) -> nn.Module | None:
    """The stitch of a side; None where there is none."""
    owner = stitch_owner(module, side)
    return None if owner is None else getattr(owner, f"{side}_stitch")


@contextmanager
def without_stitches(modules: Sequence[nn.Module], sides: Sequence[Side] = ("pre", "post")) -> Iterator[None]:
    """The modules without their stitches of these sides for a while: each maps the student's own features."""
    taken = []
    try:
        for module in modules:
            for side in sides:
                owner = stitch_owner(module, side)
                if owner is not None:
                    taken.append((owner, f"{side}_stitch", getattr(owner, f"{side}_stitch")))
                    setattr(owner, f"{side}_stitch", None)
        yield
    finally:
        for owner, name, stitch in taken:
            setattr(owner, name, stitch)
