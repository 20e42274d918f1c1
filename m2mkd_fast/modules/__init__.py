"""Take a model apart into modules, make meta models and student modules to fit, and put modules together again."""

from __future__ import annotations

from m2mkd_fast.modules.assemble import Assembly, assemble
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.modules.fit_stitches import StitchFit, fit_stitches
from m2mkd_fast.modules.fold_stitches import fold_stitches
from m2mkd_fast.modules.meta import check_compatible, hybrid, meta_model
from m2mkd_fast.modules.split import resolve_depths, split, verify_split
from m2mkd_fast.modules.state import is_stitch, load_module, load_strict, read_state, save_module, weights_hash
from m2mkd_fast.modules.student import student_modules

__all__ = [
    "Assembly",
    "ModuleChain",
    "StitchFit",
    "assemble",
    "check_compatible",
    "fit_stitches",
    "fold_stitches",
    "hybrid",
    "is_stitch",
    "load_module",
    "load_strict",
    "meta_model",
    "read_state",
    "resolve_depths",
    "save_module",
    "split",
    "student_modules",
    "verify_split",
    "weights_hash",
]
