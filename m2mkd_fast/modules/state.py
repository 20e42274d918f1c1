"""The strict files of modules; they live below, beside the models, which load and save with them too."""

from __future__ import annotations

from m2mkd_fast.models.state import (
    Loaded,
    build_without_memory,
    give_memory,
    is_stitch,
    load_module,
    load_strict,
    read_state,
    save_module,
    weights_hash,
)

__all__ = [
    "Loaded",
    "build_without_memory",
    "give_memory",
    "is_stitch",
    "load_module",
    "load_strict",
    "read_state",
    "save_module",
    "weights_hash",
]
