"""Loads the compiled modules, and keeps the reason where one cannot be loaded.

``_C`` (CPU kernels and the schemas of all ops), ``_C_cuda`` (CUDA kernels) and ``_host`` (facts about build and processor)
are optional: the package works without, on its plain PyTorch references.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch  # also loads the libraries that the compiled modules link to

_REBUILD = "reinstall where a C++ compiler and torch are present (pip install --no-build-isolation -e .)"
_REMEDY = {
    "_C": _REBUILD,
    "_C_cuda": "reinstall with M2MKD_BUILD_CUDA=1 to see what is missing",
    "_host": _REBUILD,
}


@cache
def load(name: str) -> tuple[ModuleType | None, str | None]:
    """The compiled module ``_C``, ``_C_cuda`` or ``_host``, or None and the reason why it is not there."""
    if find_spec(f"m2mkd_fast.{name}") is None:
        return None, f"m2mkd_fast.{name} was not built; {_REMEDY[name]}"
    if name == "_C_cuda" and (reason := why_missing("_C")):
        return None, reason  # the schemas are in _C
    try:
        return importlib.import_module(f"m2mkd_fast.{name}"), None
    except ImportError as error:
        return (
            None,
            f"m2mkd_fast.{name} does not load ({error}); if it was built for another torch or Python, reinstall",
        )


@torch.compiler.assume_constant_result  # torch.compile cannot trace the search for a module, and need not
def why_missing(name: str) -> str | None:
    """None where the compiled module is loaded, else the reason."""
    return load(name)[1]
