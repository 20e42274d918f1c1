"""The meta model: a shallow stand-in for every module, inside which single modules are trained and taught."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.modules.chain import ModuleChain, in_cut, out_cut
from m2mkd_fast.nn.cut import Cut


def meta_model(chain: ModuleChain, depth: int | Sequence[int] = 1) -> ModuleChain:
    """A chain with as many modules as the given one, each of `depth[i]` fresh blocks (one number: the same in all).

    Width, heads, MLP, norms, cuts, image geometry and classes are those of the given chain, usually the teacher's;
    there is no dropout and no stochastic depth, as published (Deep Incubation, arXiv 2212.04129). The initialisation is
    a function of the chain and torch's generator alone: `torch.manual_seed` before the call makes it repeatable.

    A Vision Transformer's blocks are initialised as timm does. Of any other model `depth[i]` blocks a resolution stay,
    or as many as there are, beside those that change the resolution; what starts fresh in them, and what keeps a copy
    of the teacher's values, is said in `models.fresh.fresh_graph_stage`.

    Raises:
        M2MKDError: the chain is not one that `split` made, or has stitches, or the depths do not fit it.
    """
    depths = [depth] * len(chain) if isinstance(depth, int) else list(depth)
    if len(depths) != len(chain) or min(depths) < 1:
        raise M2MKDError(
            f"meta depths {depths} do not fit a chain of {len(chain)} modules; give one positive number of blocks for "
            "all of them, or one each"
        )
    for i, stage in enumerate(chain):
        if not hasattr(stage, "fresh"):
            raise M2MKDError(f"module {i} is a {type(stage).__name__}; a meta model is made from a chain of `split`")
        if any(name.split(".")[-1] in ("pre_stitch", "post_stitch") for name, _ in stage.named_modules()):
            raise M2MKDError(f"module {i} has stitches; make the meta model from the teacher's chain")
    stages: list[nn.Module] = []
    for slot, stage in enumerate(chain):
        stages.append(stage.fresh(depths[slot], start=sum(stage.depth for stage in stages)))
        stages[slot].slot = slot
    return ModuleChain(stages)


def hybrid(meta: ModuleChain, index: int, module: nn.Module) -> ModuleChain:
    """The meta model with module `index` replaced: `M[L-1] ... M[index+1] · module · M[index-1] ... M[0]`.

    All modules are shared with the arguments, not copied. Raises M2MKDError where the module was made for another slot,
    or what it reads or gives (width, layout, grid, classes) is not what the slot does.
    """
    meta.check_index(index)
    problems = _slot_problems(meta, index, module, "the module")
    if problems:
        raise M2MKDError("; ".join(problems))
    return ModuleChain([module if i == index else stage for i, stage in enumerate(meta)])


def check_compatible(teacher: ModuleChain, meta: ModuleChain, students: Sequence[nn.Module]) -> None:
    """Raise one M2MKDError that lists everything that does not fit between teacher, meta model and student modules.

    Checked: the number of modules, width, layout and grid at each cut, the slot each module was made for, the number of
    classes, and the image geometry. Nothing is computed, so this comes before any training.
    """
    problems = []
    if not len(teacher) == len(meta) == len(students):
        problems.append(
            f"the teacher has {len(teacher)} modules, the meta model {len(meta)} and the student {len(students)}; "
            "cut all three into the same number"
        )
    else:
        for i in range(len(meta)):
            problems += _slot_problems(meta, i, teacher[i], f"teacher module {i}")
            problems += _slot_problems(meta, i, students[i], f"student module {i}")
    if problems:
        raise M2MKDError("teacher, meta model and student do not fit: " + "; ".join(problems))


def _slot_problems(meta: ModuleChain, index: int, module: nn.Module, what: str) -> list[str]:
    problems = []
    slot = getattr(module, "slot", None)
    if slot is not None and slot != index:
        problems.append(f"{what} was made for slot {slot}, not for slot {index}")
    place = meta[index]
    for side, cut in (("reads", in_cut), ("gives", out_cut)):
        # The ends of the chain have no cut: images come in, logits go out.
        theirs, ours = cut(module), cut(place)
        if (theirs is None) != (ours is None) or (ours is not None and not theirs.agrees_with(ours)):
            problems.append(
                f"{what} {side} {_described(theirs, side)} where the meta model's module {index} {side} "
                f"{_described(ours, side)} (the student's stitches take `meta.cuts`)"
            )
    facts = []
    if index == 0:
        facts.append(("image_shape", "images of shape (channels, height, width)"))
    if index == len(meta) - 1:
        facts.append(("num_classes", "this number of classes:"))
    for fact, meaning in facts:
        theirs, ours = getattr(module, fact, None), getattr(place, fact, None)
        # A circuit's read-in does not say: it takes images of several sizes.
        if None not in (theirs, ours) and _comparable(theirs) != _comparable(ours):
            problems.append(f"{what} is for {meaning} {theirs}, the meta model for {ours}")
    return problems


def _comparable(value: int | Sequence[int]) -> int | tuple[int, ...]:
    return value if isinstance(value, int) else tuple(value)


def _described(cut: Cut | None, side: str) -> str:
    if cut is not None:
        return str(cut)
    return "images" if side == "reads" else "logits"
