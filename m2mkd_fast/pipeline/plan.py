"""Which steps a configuration asks for, and what each of them needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from m2mkd_fast.pipeline.budget import annealing_steps, equal_shares, round_sizes
from m2mkd_fast.pipeline.config import RunConfig, TrainingConfig


@dataclass(frozen=True)
class Step:
    """One resumable piece of work with a folder of its own, ``steps/<name>``.

    Attributes:
        name: also its folder; an arm's steps stand in the arm's folder.
        phase: teacher, PT (meta model), MT (teacher's modules in the meta model), FT (teacher), hybrids, cache
            (features that all pairs read), round (a pair's part of a bandit's budget), m2mKD (a pair, or its end), E2E.
        needs: names of the steps whose results it reads.
        arm: which of the compared ways to train the student it belongs to; None for what the arms share.
        slot: the slot, 0 ... L-1, of a module's step.
        round: which round of a bandit's budget, from 0.
    """

    name: str
    phase: str
    needs: tuple[str, ...] = ()
    arm: str | None = None
    slot: int | None = None
    round: int | None = None


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
    if needs_modules and config.pair.cache:
        steps.append(Step("cache", "cache", (teacher, "meta", "hybrids")))
    for arm in ("m2mkd", "task"):
        if arm in config.arms:
            needs: tuple[str, ...] = (teacher, "meta", "hybrids", *(("cache",) if config.pair.cache else ()))
            ready = needs
            for index in range(config.pair.budget.rounds if config.pair.budget.kind == "bandit" else 0):
                names = [round_name(arm, index, i) for i in range(slots)]
                # What a pair gets follows from what every pair did in the rounds before.
                steps += [Step(name, "round", ready, arm, slot, index) for slot, name in enumerate(names)]
                ready = (*needs, *names)
            pairs = [Step(f"{arm}/pair{i}", "m2mKD", ready, arm=arm, slot=i) for i in range(slots)]
            steps += [*pairs, Step(f"{arm}/e2e", "E2E", tuple(step.name for step in pairs), arm=arm)]
    return steps


def round_name(arm: str, index: int, slot: int) -> str:
    """Name of a pair's step in a round of a bandit's budget."""
    return f"{arm}/round{index}/pair{slot}"


def training_steps(config: RunConfig, step: Step, slots: int) -> int:
    """Optimiser steps of a step before it has begun.

    Under a bandit's budget a pair's steps in a round follow from the rounds before; this is its equal share of them.
    """
    if step.phase in ("round", "m2mKD") and config.pair.budget.kind == "bandit":
        ends = step.phase == "m2mKD"
        total = annealing_steps(config.pair, slots) if ends else round_sizes(config.pair, slots)[step.round]
        return equal_shares(total, slots)[step.slot]
    by_phase = {
        "teacher": 0 if config.teacher.weights else config.teacher.train.steps,
        "PT": config.meta.train.steps,
        "MT": config.incubation.train.steps,
        "FT": config.incubation.finetune.steps,
        "m2mKD": config.pair.train.steps,
        "E2E": config.e2e.steps,
    }
    if step.phase == "E2E" and step.arm in ("scratch", "distill"):
        return baseline_training(config, slots).steps
    return by_phase.get(step.phase, 0)


def baseline_training(config: RunConfig, slots: int) -> TrainingConfig:
    """Training of the arms without modules; as many steps as the modular arm takes in all, if that is asked for."""
    training = replace(config.baseline.train)
    if config.baseline.match_steps:
        training.steps = config.meta.train.steps + slots * config.pair.train.steps + config.e2e.steps
    return training


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
