"""Which steps a configuration asks for, and what each of them needs."""

from __future__ import annotations

from dataclasses import dataclass

from m2mkd_fast.pipeline.config import RunConfig


@dataclass(frozen=True)
class Step:
    """One resumable piece of work with a folder of its own, ``steps/<name>``.

    Attributes:
        name: also its folder; an arm's steps stand in the arm's folder.
        phase: teacher, PT (meta model), MT (teacher's modules in the meta model), FT (teacher), hybrids, m2mKD, E2E.
        needs: names of the steps whose results it reads.
        arm: which of the compared ways to train the student it belongs to; None for what the arms share.
        slot: the slot, 0 ... L-1, of a module's step.
    """

    name: str
    phase: str
    needs: tuple[str, ...] = ()
    arm: str | None = None
    slot: int | None = None


def plan(config: RunConfig, slots: int) -> list[Step]:
    """The steps in an order in which each comes after what it needs."""
    steps = []
    incubated = config.meta.source == "labels"
    teacher = "ft" if incubated else "teacher"
    needs_modules = bool({"m2mkd", "task"} & set(config.arms))
    if "scratch" in config.arms:
        steps.append(Step("scratch/e2e", "E2E", arm="scratch"))
    if incubated and (needs_modules or "distill" in config.arms):
        modules = [Step(f"mt{i}", "MT", ("meta",), slot=i) for i in range(slots)]
        finetune = Step("ft", "FT", tuple(step.name for step in modules))
        steps += [Step("meta", "PT"), *modules, finetune]
    elif needs_modules or "distill" in config.arms:
        steps.append(Step("teacher", "teacher"))
        if needs_modules:
            steps.append(Step("meta", "PT", ("teacher",)))
    if "distill" in config.arms:
        steps.append(Step("distill/e2e", "E2E", (teacher,), arm="distill"))
    if needs_modules:
        steps.append(Step("hybrids", "hybrids", (teacher, "meta")))
    for arm in ("m2mkd", "task"):
        if arm in config.arms:
            pairs = [
                Step(f"{arm}/pair{i}", "m2mKD", (teacher, "meta", "hybrids"), arm=arm, slot=i) for i in range(slots)
            ]
            steps += [*pairs, Step(f"{arm}/e2e", "E2E", tuple(step.name for step in pairs), arm=arm)]
    return steps


def closure(steps: list[Step], wanted: list[Step]) -> list[Step]:
    """The wanted steps and everything they need, in the plan's order."""
    by_name = {step.name: step for step in steps}
    names: set[str] = set()
    stack = [step.name for step in wanted]
    while stack:
        name = stack.pop()
        if name not in names:
            names.add(name)
            stack += by_name[name].needs
    return [step for step in steps if step.name in names]
