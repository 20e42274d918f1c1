"""Plain sentences that follow from the numbers, and none that does not."""

from __future__ import annotations

from math import floor
from typing import Any

from m2mkd_fast.report.costs import ARMS, QUANTITIES
from m2mkd_fast.report.units import Unit, flop_unit, join_words, time_unit

_CLOSE_TO_TEACHER = 1.0  # points of accuracy


def write_notes(results: dict[str, Any]) -> list[str]:
    """Sentences on the arms' race, their end, the cold start, the hybrids and what is missing."""
    accuracy, cost = results["accuracy"], results["cost"]
    totals = {q: [(cost["arms"][arm]["total"][q] or {}).get("max") for arm in ARMS] for q in QUANTITIES}
    units = {"flops": flop_unit(totals["flops"]), "seconds": time_unit(totals["seconds"])}
    notes = [
        *_race_to_common_accuracy(accuracy, cost, units),
        *_close_to_teacher(accuracy, cost, units),
        *_differences(accuracy),
        *_cold(accuracy),
        *_hybrids(accuracy),
    ]
    if len(results["runs"]) == 1 and any(accuracy["arms"][arm]["final_test_accuracy"] for arm in ARMS):
        notes.append(
            "This is one run: differences between arms that another seed would not repeat cannot be told apart."
        )
    for run in results["runs"]:
        if run["corrupt_lines"]:
            where = join_words([f"{count} in {step}" for step, count in run["corrupt_lines"].items()])
            notes.append(f"Run {run['folder']}: unreadable metrics lines were left out ({where}).")
    for run in cost["runs"]:
        for arm in ARMS:
            if run["arms"][arm] and run["arms"][arm]["curve"] and not run["arms"][arm]["complete"]:
                notes.append(f"Arm {arm} has steps missing or unfinished, so its cost is a lower bound.")
    return list(dict.fromkeys(notes))


def first_reached(accuracy: dict[str, Any], cost: dict[str, Any], arm: str, target: float) -> dict[str, Any] | None:
    """Cost of the arm's first evaluation with a mean accuracy of at least `target` per cent; None where none has."""
    for point, spent in zip(accuracy["arms"][arm]["curve"], cost["arms"][arm]["curve"], strict=True):
        if point["mean"] >= target:
            return spent
    return None


def _race_to_common_accuracy(accuracy: dict[str, Any], cost: dict[str, Any], units: dict[str, Unit]) -> list[str]:
    best = {arm: max((p["mean"] for p in accuracy["arms"][arm]["curve"]), default=None) for arm in ARMS}
    runners = [arm for arm in ARMS if best[arm] is not None]
    if len(runners) < 2:
        return []
    # The highest whole per cent that all of them reached: the only level at which all costs exist.
    target = float(floor(min(best[arm] for arm in runners)))
    reached = {arm: first_reached(accuracy, cost, arm, target) for arm in runners}
    notes = []
    for quantity in QUANTITIES:
        order = sorted(runners, key=lambda arm: reached[arm][quantity])
        listed = join_words([f"{arm} after {units[quantity].text(reached[arm][quantity])}" for arm in order])
        what = "compute" if quantity == "flops" else "time"
        notes.append(f"In {what}, {order[0]} was the first arm at {target:.0f} % test accuracy: {listed}.")
    return notes


def _close_to_teacher(accuracy: dict[str, Any], cost: dict[str, Any], units: dict[str, Unit]) -> list[str]:
    teacher = accuracy["teacher"]["test_accuracy"]
    if teacher is None:
        return []
    target = teacher["mean"] - _CLOSE_TO_TEACHER
    reached, short = [], []
    for arm in ARMS:
        curve = accuracy["arms"][arm]["curve"]
        if not curve:
            continue
        spent = first_reached(accuracy, cost, arm, target)
        if spent is None:
            short.append(f"{arm} (best {max(point['mean'] for point in curve):.1f} %)")
        else:
            reached.append(
                f"{arm} after {units['flops'].text(spent['flops'])} and {units['seconds'].text(spent['seconds'])}"
            )
    level = f"the teacher's accuracy minus {_CLOSE_TO_TEACHER:.0f} point ({target:.1f} %)"
    notes = [f"{level[0].upper()}{level[1:]} was reached by {join_words(reached)}."] if reached else []
    if short:
        notes.append(f"{level[0].upper()}{level[1:]} was not reached by {join_words(short)}.")
    return notes


def _differences(accuracy: dict[str, Any]) -> list[str]:
    finals = {arm: accuracy["arms"][arm]["final_test_accuracy"] for arm in ARMS}
    subject = finals["m2mkd"]
    if subject is None:
        return []
    parts, overlapping = [], []
    for arm in ARMS[:-1]:
        other = finals[arm]
        if other is None:
            continue
        gap = subject["mean"] - other["mean"]
        parts.append(
            f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'} {arm}" if round(gap, 1) else f"level with {arm}"
        )
        several = min(len(_present(subject)), len(_present(other))) > 1
        if several and subject["min"] <= other["max"] and other["min"] <= subject["max"]:
            overlapping.append(arm)
    notes = [f"Final test accuracy of m2mkd ({subject['mean']:.1f} %) is {join_words(parts)}."] if parts else []
    if overlapping:
        notes.append(f"The ranges over the seeds of m2mkd and {join_words(overlapping)} overlap.")
    return notes


def _cold(accuracy: dict[str, Any]) -> list[str]:
    notes = []
    for arm in ARMS:
        part = accuracy["arms"][arm]
        kept, folded, dropped = (part[f"cold_{name}_test_accuracy"] for name in ("kept", "folded", "dropped"))
        cold = part["cold_test_accuracy"]
        if kept and dropped:
            between = f", {folded['mean']:.1f} % with them folded" if folded else ""
            notes.append(
                f"Before any end-to-end step the assembled {arm} student has {kept['mean']:.1f} % test accuracy with "
                f"its stitches kept{between} and {dropped['mean']:.1f} % with them dropped."
            )
        elif cold and arm in ("task", "m2mkd"):
            notes.append(
                f"Before any end-to-end step the assembled {arm} student has {cold['mean']:.1f} % test accuracy."
            )
    return notes


def _hybrids(accuracy: dict[str, Any]) -> list[str]:
    rows = [row for run in accuracy["runs"] for row in run["hybrids"] if row["difference"] is not None]
    if not rows:
        return []
    worst, best = min(rows, key=lambda row: row["difference"]), max(rows, key=lambda row: row["difference"])
    note = (
        f"With the meta model's slot taken by the teacher's module, test accuracy is {worst['difference']:+.1f} points "
        f"(slot {worst['slot']}) to {best['difference']:+.1f} points (slot {best['slot']}) from the teacher's."
    )
    return [note]


def _present(statistic: dict[str, Any]) -> list[float]:
    return [value for value in statistic["values"] if value is not None]
