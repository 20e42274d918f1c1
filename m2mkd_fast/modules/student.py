"""Student modules: independent copies of a student's parts, stitched to the widths of the meta model."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.modules.split import Parts, resolve_depths, split


def student_modules(
    model: nn.Module, parts: Parts | None, cut_widths: Sequence[int], *, tokens: int = 1
) -> list[nn.Module]:
    """The modules of a student, each of which fits a slot of a meta model with `cut_widths` between its slots.

    Module i is an independent deep copy of part i of the model with a stitch from `cut_widths[i-1]` before it and one
    to `cut_widths[i]` after it; the first has no stitch before it, the last none after. `assemble` puts them together
    again.

    Args:
        model: a Vision Transformer or V-MoE, or a Neural Attentive Circuit.
        parts: as in `split`. None for a circuit, whose modules are given: read-in, one for each propagator, read-out.
        cut_widths: widths at the L-1 cuts of the meta model (`meta.widths`).
        tokens: latents that a circuit's read-in gives to the meta model: 1 as published, the teacher's number of tokens
            for a loss that compares features.

    Raises:
        M2MKDError: the number of parts is not `len(cut_widths) + 1`, or the model is of another kind.
    """
    if hasattr(model, "module_key"):
        from m2mkd_fast.models.nac.student import student_modules as circuit_modules

        if parts is not None:
            raise M2MKDError(
                f"parts {parts!r} given for a circuit, whose modules are given by its propagators; pass None"
            )
        modules = circuit_modules(model, cut_widths, tokens=tokens)
        modules[len(cut_widths)].num_classes = model.num_classes
    else:
        if parts is None:
            raise M2MKDError(f"no parts given for a {type(model).__name__}; say how to cut it, as in `split`")
        modules = _transformer_modules(model, parts, cut_widths)
    for slot, module in enumerate(modules):
        module.slot = slot
    return modules


def _transformer_modules(model: nn.Module, parts: Parts, cut_widths: Sequence[int]) -> list[nn.Module]:
    chain = split(model, parts)
    if len(chain) != len(cut_widths) + 1:
        raise M2MKDError(
            f"{len(chain)} student modules ({list(resolve_depths(model, parts))} blocks) do not fit a meta model with "
            f"{len(cut_widths)} cuts; it needs {len(cut_widths) + 1} modules"
        )
    modules = []
    for i, view in enumerate(chain):
        stage = copy.deepcopy(view)
        stage.attach_stitches(
            pre_width=None if view.is_first else cut_widths[i - 1], post_width=None if view.is_last else cut_widths[i]
        )
        modules.append(stage)
    return modules
