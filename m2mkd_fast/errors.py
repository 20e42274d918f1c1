"""Errors that a user can act on: each names the value, what was expected, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class M2MKDError(Exception):
    """Something the user asked for cannot be done; the message says what, why and what to do instead."""


class UnknownNameError(M2MKDError):
    """A name that is not in a registry, a configuration or a folder."""

    def __init__(self, kind: str, name: str, known: Iterable[str], remedy: str = "") -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        if near:
            hint = "did you mean " + " or ".join(repr(candidate) for candidate in near) + "?"
        elif len(known) <= 12:
            hint = "known: " + ", ".join(known)
        else:
            hint = f"there are {len(known)} known names, none of them near"
        super().__init__(f"unknown {kind} {name!r}; {hint}" + (f" {remedy}" if remedy else ""))
        self.kind, self.name, self.near = kind, name, near
        self._arguments = (kind, name, known, remedy)

    def __reduce__(self) -> tuple[type, tuple]:
        # An exception that crosses processes is rebuilt from its arguments, which by default is the message alone.
        return type(self), self._arguments
