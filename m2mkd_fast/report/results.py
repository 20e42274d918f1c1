"""The report's content as one JSON-able dictionary with the same keys for every run.

`results["accuracy"]` holds what a repeated run with the same seed must find again bit for bit (accuracies, losses,
expert load, density of a learned graph, numbers of steps) and nothing that depends on the machine; `results["cost"]`
holds FLOPs and seconds, and what was made of the machine. Lists called `runs` have one entry per run folder, in the
order given. A statistic over runs is `{"mean", "min", "max", "values"}`, or None where no run has the value; a single
run has the same keys with its one value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.report.costs import ARMS, MODULE_ARMS, QUANTITIES, cost_of_run, curve_points
from m2mkd_fast.report.notes import write_notes
from m2mkd_fast.report.run_folder import Run, Step, flatten, number
from m2mkd_fast.report.throughput import throughput_of_run

FORMAT = 1
ARM_METRICS = {
    "final_test_accuracy": "test_accuracy",
    "final_ood_accuracy": "ood_accuracy",
    "cold_test_accuracy": "cold_test_accuracy",
    "cold_kept_test_accuracy": "cold_kept_test_accuracy",
    "cold_folded_test_accuracy": "cold_folded_test_accuracy",
    "cold_dropped_test_accuracy": "cold_dropped_test_accuracy",
}
# Keys that may differ between runs of one configuration: they say which run it is and where and how fast it runs.
_FREE_KEYS = {"seed", "run", "run_folder", "folder", "output", "device", "workers", "num_workers", "threads"}
_TAIL = 0.1  # share of a pair's last training lines over which its loss is averaged: one batch's loss is too noisy


def collect_results(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything the report says, from one run or from several that differ by their seed.

    Raises:
        M2MKDError: no run, or runs whose configurations differ in more than seed, folder and machine settings.
    """
    if not runs:
        raise M2MKDError("no run folder given; name at least one")
    _require_same_configuration(runs)
    accuracies = [accuracy_of_run(run) for run in runs]
    costs = [cost_of_run(run) | {"throughput": throughput_of_run(run)} for run in runs]
    kept_steps = {arm: _common_steps([a["arms"][arm] for a in accuracies]) for arm in ARMS}
    results = {
        "format": FORMAT,
        "runs": [
            {
                "folder": run.folder.name,
                "seed": run.seed,
                "info": run.info,
                "missing": missing_parts(run),
                "corrupt_lines": {s.name: s.corrupt_lines for s in run.steps.values() if s.corrupt_lines},
            }
            for run in runs
        ],
        "config": runs[0].config,
        "accuracy": {
            "teacher": _spreads([a["teacher"] for a in accuracies], ("test_accuracy", "ood_accuracy")),
            "meta": _spreads([a["meta"] for a in accuracies], ("test_accuracy", "ood_accuracy")),
            "arms": {
                arm: {
                    **_spreads([a["arms"][arm] or {} for a in accuracies], tuple(ARM_METRICS)),
                    "curve": _accuracy_curve([a["arms"][arm] for a in accuracies], kept_steps[arm]),
                }
                for arm in ARMS
            },
            "runs": accuracies,
        },
        "cost": {
            "arms": {
                arm: {
                    part: {q: spread([(c["arms"][arm] or {}).get(part, {}).get(q) for c in costs]) for q in QUANTITIES}
                    for part in ("preparation", "preparation_in_parallel", "total")
                }
                | {"curve": _cost_curve([c["arms"][arm] for c in costs], kept_steps[arm])}
                for arm in ARMS
            },
            "runs": costs,
        },
    }
    results["notes"] = write_notes(results)
    return results


def accuracy_of_run(run: Run) -> dict[str, Any]:
    """The part of one run that does not depend on the machine's speed; accuracies are in per cent."""
    teacher = teacher_step(run)
    meta = run.steps.get("meta")
    teacher_accuracy = teacher.metric("test_accuracy") if teacher else None
    return {
        "teacher": _metrics(teacher, {"test_accuracy": "test_accuracy", "ood_accuracy": "ood_accuracy"}),
        "meta": _metrics(meta, {"test_accuracy": "test_accuracy", "ood_accuracy": "ood_accuracy"}),
        "arms": {arm: _accuracy_of_arm(run, arm) for arm in ARMS},
        "hybrids": _hybrids(run, teacher_accuracy),
        "pairs": {arm: [_pair(step) for step in run.pairs(arm)] for arm in MODULE_ARMS},
        **{
            key: {name: step.result[key] for name, step in run.steps.items() if step.result and step.result.get(key)}
            for key in ("expert_load", "graph_density")
        },
    }


def teacher_step(run: Run) -> Step | None:
    """The step whose model gives the teacher modules: the fine-tuned incubated teacher before the plain one."""
    for name in ("ft", "teacher"):
        if name in run.steps and run.steps[name].metric("test_accuracy") is not None:
            return run.steps[name]
    return run.steps.get("teacher")


def missing_parts(run: Run) -> list[str]:
    """One sentence for each file or step that a complete four-arm run has and this one lacks."""
    missing = [f"{name} is missing" for name in ("config.yaml", "run.json") if not (run.folder / name).is_file()]
    expected = ["teacher", "meta", "hybrids"]
    for arm in ARMS:
        if arm in MODULE_ARMS:
            expected += [f"{arm}/pair{slot}" for slot in range(run.slots)] or [f"{arm}/pair0"]
        expected.append(f"{arm}/e2e")
    expected += [name for name in run.steps if name not in expected]
    for name in expected:
        step = run.steps.get(name)
        if step is None:
            if not (name == "teacher" and "ft" in run.steps):
                missing.append(f"step {name} was not run")
        elif not step.finished:
            missing.append(f"step {name} is unfinished (last line at step {step.training_steps})")
    return missing


def spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, least, greatest and all of the values that are there; None where none is."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    mean = present[0] if len(set(present)) == 1 else sum(present) / len(present)
    return {"mean": mean, "min": min(present), "max": max(present), "values": list(values)}


def _spreads(parts: Sequence[dict[str, Any]], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: spread([part.get(key) for part in parts]) for key in keys}


def _metrics(step: Step | None, names: dict[str, str]) -> dict[str, float | None]:
    return {key: step.metric(name) if step else None for key, name in names.items()}


def _accuracy_of_arm(run: Run, arm: str) -> dict[str, Any] | None:
    step = run.steps.get(f"{arm}/e2e")
    if step is None:
        return None
    curve = [
        {"step": p["step"], "test_accuracy": p["test_accuracy"], "ood_accuracy": number(p.get("ood_accuracy"))}
        for p in curve_points(step)
    ]
    accuracies = _metrics(step, ARM_METRICS)
    # The arm continued from one of the assemblies; its cold accuracy is that one's where it is not written apart.
    stitches = (step.result or {}).get("plan", {}).get("stitches")
    if stitches in ("kept", "folded", "dropped") and accuracies[f"cold_{stitches}_test_accuracy"] is None:
        accuracies[f"cold_{stitches}_test_accuracy"] = accuracies["cold_test_accuracy"]
    return {**accuracies, "training_steps": step.training_steps, "finished": step.finished, "curve": curve}


def _hybrids(run: Run, teacher_accuracy: float | None) -> list[dict[str, Any]]:
    step = run.steps.get("hybrids")
    accuracies = ((step.result if step else None) or {}).get("metrics", {}).get("hybrid_accuracy") or []
    rows = []
    for slot, value in enumerate(accuracies):
        accuracy = number(value)
        known = accuracy is not None and teacher_accuracy is not None
        rows.append(
            {
                "slot": slot,
                "test_accuracy": accuracy,
                "teacher_test_accuracy": teacher_accuracy,
                "difference": accuracy - teacher_accuracy if known else None,
            }
        )
    return rows


def _pair(step: Step) -> dict[str, Any]:
    return {
        "slot": step.slot,
        "finished": step.finished,
        "training_steps": step.training_steps,
        "loss": _tail_mean([number(line.get("loss")) for line in step.training]),
        "terms": _tail_means(step, "terms"),
        "gradient_share": _tail_means(step, "gradient_share"),
        "stitch_fit": (step.result or {}).get("stitch_fit") or {},
        # Under a bandit's budget: steps, and the loss before and after them, of every round and of the end.
        "slices": ((step.result or {}).get("budget") or {}).get("slices") or [],
        "test_accuracy": step.metric("test_accuracy"),
    }


def _tail_means(step: Step, key: str) -> dict[str, float | None]:
    """Each named number under `key`, averaged over the last of the lines that have it."""
    lines = [line[key] for line in step.training if isinstance(line.get(key), dict)]
    names = list(dict.fromkeys(name for line in lines for name in line))
    return {name: _tail_mean([number(line[name]) for line in lines if name in line]) for name in names}


def _tail_mean(values: list[float | None]) -> float | None:
    """Mean of the last tenth (at least one value); None where a value of it is missing or not finite."""
    tail = values[len(values) - max(1, round(_TAIL * len(values))) :]
    return sum(tail) / len(tail) if tail and None not in tail else None


def _common_steps(arms: Sequence[dict[str, Any] | None]) -> list[int]:
    """Training steps at which every run of the arm was evaluated: only there do means over runs compare."""
    sets = [{point["step"] for point in arm["curve"]} for arm in arms if arm and arm["curve"]]
    return sorted(set.intersection(*sets)) if sets else []


def _accuracy_curve(arms: Sequence[dict[str, Any] | None], steps: list[int]) -> list[dict[str, Any]]:
    curves = [{point["step"]: point["test_accuracy"] for point in arm["curve"]} for arm in arms if arm and arm["curve"]]
    points = []
    for step in steps:
        statistic = spread([curve[step] for curve in curves])
        points.append({"step": step, "mean": statistic["mean"], "min": statistic["min"], "max": statistic["max"]})
    return points


def _cost_curve(arms: Sequence[dict[str, Any] | None], steps: list[int]) -> list[dict[str, Any]]:
    curves = [{point["step"]: point for point in arm["curve"]} for arm in arms if arm and arm["curve"]]
    return [
        {"step": step, **{q: spread([curve[step][q] for curve in curves])["mean"] for q in QUANTITIES}}
        for step in steps
    ]


def _require_same_configuration(runs: Sequence[Run]) -> None:
    first = _comparable(runs[0])
    for run in runs[1:]:
        other = _comparable(run)
        differing = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        if differing:
            shown = ", ".join(f"{key} ({first.get(key)!r} and {other.get(key)!r})" for key in differing[:5])
            raise M2MKDError(
                f"runs '{runs[0].folder}' and '{run.folder}' have different configurations: {shown}"
                + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
                + "; a mean over them would mean nothing, report them apart"
            )


def _comparable(run: Run) -> dict[str, Any]:
    return {key: value for key, value in flatten(run.config).items() if key.split(".")[-1] not in _FREE_KEYS}
