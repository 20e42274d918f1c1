"""Loads the compiled modules, and keeps the reason where one cannot be loaded.

``_C`` (CPU kernels and the schemas of all ops), ``_C_cuda`` (CUDA kernels) and ``_host`` (facts about build and
processor, search for an order of latents) are optional: the package works without, on its plain PyTorch references.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType

import torch  # noqa: F401  loads the libraries that the compiled modules link to

_REBUILD = "reinstall where a C++ compiler and torch are present (pip install --no-build-isolation -e .)"
_REMEDY = {
    "_C": _REBUILD,
    "_C_cuda": "reinstall with M2MKD_BUILD_CUDA=1 to see what is missing",
    "_host": _REBUILD,
}


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    if find_spec(f"m2mkd_fast.{name}") is None:
        return None, f"m2mkd_fast.{name} was not built; {_REMEDY[name]}"
    try:
        return importlib.import_module(f"m2mkd_fast.{name}"), None
    except ImportError as error:
        return None, f"m2mkd_fast.{name} does not load ({error}); was it built for another torch or Python? Reinstall"


# All at once and here, not on first use: torch.compile cannot trace the search for a module. Loading starts no CUDA.
_LOADED = {name: _load(name) for name in ("_C", "_host")}
_LOADED["_C_cuda"] = _load("_C_cuda") if _LOADED["_C"][0] else (None, _LOADED["_C"][1])  # the schemas are in _C


def load(name: str) -> tuple[ModuleType | None, str | None]:
    """The compiled module ``_C``, ``_C_cuda`` or ``_host``, or None and the reason why it is not there."""
    return _LOADED[name]


def why_missing(name: str) -> str | None:
    """None where the compiled module is loaded, else the reason."""
    return _LOADED[name][1]
