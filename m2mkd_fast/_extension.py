"""Loads the compiled modules, and keeps the reason where one cannot be loaded.

``_C`` (CPU kernels and the schemas of all ops), ``_C_cuda`` (CUDA kernels) and ``_host`` (facts about build and processor) are
optional: the package works without, on its plain PyTorch references.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from types import ModuleType

_NOT_BUILT = {
    "_C": "it was not built; reinstall where a C++ compiler and torch are present (pip install --no-build-isolation -e .)",
    "_C_cuda": "it was not built; reinstall with M2MKD_BUILD_CUDA=1 to see what is missing",
    "_host": "it was not built; reinstall where a C++ compiler and torch are present (pip install --no-build-isolation -e .)",
}


@cache
def load(name: str) -> tuple[ModuleType | None, str | None]:
    """The compiled module ``_C``, ``_C_cuda`` or ``_host``, or None and the reason why it is not there."""
    if find_spec(f"m2mkd_fast.{name}") is None:
        return None, f"m2mkd_fast.{name} is missing: {_NOT_BUILT[name]}"
    if name == "_C_cuda":
        _, reason = load("_C")
        if reason is not None:
            return None, reason
    try:
        return importlib.import_module(f"m2mkd_fast.{name}"), None
    except ImportError as error:
        return None, f"m2mkd_fast.{name} does not load: {error}; was it built for another torch or Python? Reinstall it"


def why_missing(name: str) -> str | None:
    """None where the compiled module is loaded, else the reason."""
    return load(name)[1]
