"""Student modules: independent copies of a student's parts, stitched to what passes between the meta model's."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.modules.origin import remember_origin
from m2mkd_fast.modules.split import Parts, split
from m2mkd_fast.nn.cut import Cut


def student_modules(
    model: nn.Module,
    parts: Parts | None,
    cuts: Sequence[Cut | int],
    *,
    tokens: int = 1,
    image_shape: tuple[int, int, int] | None = None,
) -> list[nn.Module]:
    """The modules of a student, each of which fits a slot of a meta model with `cuts` between its slots.

    Module i is an independent deep copy of part i of the model with a stitch from `cuts[i-1]` before it and one to
    `cuts[i]` after it; the first has no stitch before it, the last none after. A stitch lays the features out anew
    where the student's layout, grid or prefix tokens are others than the teacher's (`nn.cut.rearrange`). `assemble`
    puts the modules together again.

    Args:
        model: a model that `split` can cut (Vision Transformer, V-MoE, ...), or a Neural Attentive Circuit.
        parts: as in `split`. None for a circuit, whose modules are given: read-in, one for each propagator, read-out.
        cuts: what passes at the L-1 cuts of the meta model (`meta.cuts`). A number is tokens of that width, whose
            number and grid are taken as they come.
        tokens: latents that a circuit's read-in gives to the meta model: 1 as published, the teacher's number of tokens
            for a loss that compares features.
        image_shape: as in `split`.

    Raises:
        M2MKDError: the number of parts is not `len(cuts) + 1`, or the model is of another kind.
    """
    if hasattr(model, "module_key"):
        from m2mkd_fast.models.nac.student import student_modules as circuit_modules

        if parts is not None:
            raise M2MKDError(
                f"parts {parts!r} given for a circuit, whose modules are given by its propagators; pass None"
            )
        modules = circuit_modules(model, cuts, tokens=tokens)
        modules[len(cuts)].num_classes = model.num_classes
    else:
        if parts is None:
            raise M2MKDError(f"no parts given for a {type(model).__name__}; say how to cut it, as in `split`")
        modules = _stages(model, parts, cuts, image_shape)
    for slot, module in enumerate(modules):
        module.slot = slot
    remember_origin(modules, model, parts, cuts, tokens)
    return modules


def _stages(
    model: nn.Module, parts: Parts, cuts: Sequence[Cut | int], image_shape: tuple[int, int, int] | None
) -> list[nn.Module]:
    chain = split(model, parts, image_shape)
    if len(chain) != len(cuts) + 1:
        raise M2MKDError(
            f"{len(chain)} student modules ({[stage.depth for stage in chain]} blocks) do not fit a meta model with "
            f"{len(cuts)} cuts; it needs {len(cuts) + 1} modules"
        )
    modules = []
    for i, view in enumerate(chain):
        stage = copy.deepcopy(view)
        stage.attach_stitches(
            pre_cut=None if view.is_first else cuts[i - 1], post_cut=None if view.is_last else cuts[i]
        )
        modules.append(stage)
    return modules
