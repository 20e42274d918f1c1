"""What each arm cost, and which steps it is charged for.

The teacher is pretrained, so its own training is stated and charged to no arm. Everything else that an arm needs is
charged to it in full, also where two arms share it: the meta model (PT) and the features that pairs read (cache) to
both arms that train modules, and the teacher modules made by module incubation (MT, FT) to `m2mkd`, the only arm that
cannot do without them.

An arm that trains modules starts its end-to-end curve at that cost. *In parallel* counts the longest pair (and the
longest of the MT steps) in place of their sum: the critical path with one machine per pair. Under a bandit's budget, in
which all pairs wait for the longest in each round, it counts the longest of every round and of what follows them.
"""

from __future__ import annotations

from typing import Any

from m2mkd_fast.report.run_folder import Run, Step, number

ARMS = ("scratch", "distill", "task", "m2mkd")
MODULE_ARMS = ("task", "m2mkd")
QUANTITIES = ("flops", "seconds")
CHARGED_PHASES = {"scratch": (), "distill": (), "task": ("PT", "cache"), "m2mkd": ("PT", "MT", "FT", "cache")}
PHASES = ("PT", "MT", "FT", "cache", "m2mKD", "E2E")


def cost_of_run(run: Run) -> dict[str, Any]:
    """Training FLOPs (forward and backward) and seconds of every step, of the teacher and of the arms.

    Returns:
        `steps`: per step name its phase, slot, whether it finished, training steps, images, flops, seconds; `teacher`:
        the same two quantities, None where the run has no teacher step; `arms`: per arm None (no step of it began) or
        `phases`, `preparation`, `preparation_in_parallel`, `total` (each with flops and seconds), `training_steps`,
        `complete` and `curve`, whose points belong to those of the accuracy's curve.
    """
    steps = {
        name: {
            "phase": step.phase,
            "slot": step.slot,
            "finished": step.finished,
            "training_steps": step.training_steps,
            "images": number((step.result or {}).get("images")),
            **{quantity: step.spent(quantity) for quantity in QUANTITIES},
        }
        for name, step in run.steps.items()
    }
    teacher = run.steps.get("teacher")
    return {
        "steps": steps,
        "teacher": {quantity: teacher.spent(quantity) for quantity in QUANTITIES} if teacher else None,
        "arms": {arm: _cost_of_arm(run, arm) for arm in ARMS},
    }


def steps_of_arm(run: Run, arm: str) -> dict[str, list[Step]]:
    """The started steps that the arm is charged for, by phase."""
    found = {phase: run.of_phase(phase) if phase in CHARGED_PHASES[arm] else [] for phase in PHASES}
    found["m2mKD"] = run.pairs(arm)
    found["E2E"] = [run.steps[f"{arm}/e2e"]] if f"{arm}/e2e" in run.steps else []
    return found


def curve_points(step: Step) -> list[dict[str, Any]]:
    """Evaluations of an end-to-end step: the lines of its metrics, closed by what only its result holds.

    The accuracy before the first training step stands at step 0 and the final accuracy at the last, whether or not the
    training loop wrote them as lines.
    """
    points = [line for line in step.evaluations if number(line.get("test_accuracy")) is not None]
    cold = step.metric("cold_test_accuracy")
    if cold is not None and (not points or points[0]["step"] > 0):
        points.insert(0, {"step": 0, "test_accuracy": cold, "flops": 0.0, "seconds": 0.0})
    final = step.metric("test_accuracy")
    if final is not None and (not points or points[-1]["step"] < step.training_steps):
        last = {quantity: step.spent(quantity) for quantity in QUANTITIES}
        points.append({"step": step.training_steps, "test_accuracy": final, **last})
        if step.metric("ood_accuracy") is not None:
            points[-1]["ood_accuracy"] = step.metric("ood_accuracy")
    return points


def _cost_of_arm(run: Run, arm: str) -> dict[str, Any] | None:
    by_phase = steps_of_arm(run, arm)
    if not by_phase["m2mKD"] and not by_phase["E2E"]:
        return None
    phases = {
        phase: {quantity: sum(step.spent(quantity) for step in steps) for quantity in QUANTITIES}
        for phase, steps in by_phase.items()
    }
    preparation = {q: sum(phases[phase][q] for phase in PHASES if phase != "E2E") for q in QUANTITIES}
    in_parallel = {
        q: phases["PT"][q] + phases["FT"][q] + _longest(by_phase["MT"], q) + _longest_pairs(run, arm, q)
        for q in QUANTITIES
    }
    curve = []
    for point in curve_points(by_phase["E2E"][0]) if by_phase["E2E"] else []:
        curve.append({"step": point["step"], **{q: preparation[q] + (number(point.get(q)) or 0.0) for q in QUANTITIES}})
    return {
        "phases": phases,
        "preparation": preparation,
        "preparation_in_parallel": in_parallel,
        "total": {q: preparation[q] + phases["E2E"][q] for q in QUANTITIES},
        "training_steps": {
            "total": sum(step.training_steps for steps in by_phase.values() for step in steps),
            "end_to_end": sum(step.training_steps for step in by_phase["E2E"]),
        },
        "complete": _complete(run, arm, by_phase),
        "curve": curve,
    }


def _longest(steps: list[Step], quantity: str) -> float:
    return max((step.spent(quantity) for step in steps), default=0.0)


def _longest_pairs(run: Run, arm: str, quantity: str) -> float:
    """The longest pair, or where the pairs took rounds, the longest of each round and of the rest."""
    rounds = run.rounds(arm)
    rest = {step.slot: step.spent(quantity) for step in run.pairs(arm)}  # of a whole pair, its rounds included
    for step in (step for steps in rounds for step in steps if step.slot in rest):
        rest[step.slot] -= step.spent(quantity)
    return sum(_longest(steps, quantity) for steps in rounds) + max(rest.values(), default=0.0)


def _complete(run: Run, arm: str, by_phase: dict[str, list[Step]]) -> bool:
    """Whether every step the arm needs is finished: for a module arm also the meta model and a pair per slot."""
    if not by_phase["E2E"] or not all(step.finished for steps in by_phase.values() for step in steps):
        return False
    return arm not in MODULE_ARMS or bool(by_phase["PT"] and len(by_phase["m2mKD"]) == run.slots)
