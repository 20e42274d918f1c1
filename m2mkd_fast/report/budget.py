"""What a bandit's budget gave to each pair, and how far the pair's loss fell for it."""

from __future__ import annotations

from typing import Any

from m2mkd_fast.report.costs import MODULE_ARMS
from m2mkd_fast.report.units import accuracy_text, significant

_RULES = (
    "A bandit shared the steps out by how fast each pair's loss fell. These losses are of the pair's first training "
    "batches in evaluation mode, the same ones every time."
)
_HEADS = ["run", "arm", "slot", "steps", "in each round", "annealing", "loss at the start", "after the rounds"]
_HEADS += ["at the end", "hybrid accuracy with the student module (%)"]


def budget_table(results: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """(text, heads, rows) on all pairs under a bandit's budget; an empty text where there are none."""
    rows, sentences = [], []
    for run, accuracy in zip(results["runs"], results["accuracy"]["runs"], strict=True):
        where = f"In run {run['folder']}, of" if len(results["runs"]) > 1 else "Of"
        for arm in MODULE_ARMS[::-1]:
            pairs = [pair for pair in accuracy["pairs"][arm] if pair["slices"]]
            rows += [_row(run["folder"], arm, pair) for pair in pairs]
            if pairs:
                sentences.append(f"{where} {_allocation(arm, pairs)}")
    return " ".join([_RULES, *sentences]) if rows else "", _HEADS, rows


def _row(folder: str, arm: str, pair: dict[str, Any]) -> list[str]:
    *rounds, end = pair["slices"]
    losses = (pair["slices"][0]["loss_before"], end["loss_before"], end["loss_after"])
    row = [folder, arm, str(pair["slot"]), f"{_steps(pair):,}", " ".join(str(part["steps"]) for part in rounds)]
    return [*row, str(end["steps"]), *map(significant, losses), accuracy_text(pair["test_accuracy"])]


def _allocation(arm: str, pairs: list[dict[str, Any]]) -> str:
    steps = {pair["slot"]: _steps(pair) for pair in pairs}
    total = sum(steps.values())
    most, least = max(steps, key=steps.__getitem__), min(steps, key=steps.__getitem__)
    if steps[most] == steps[least]:
        return f"the {total:,} steps of {arm} every pair got as many."
    equal = total / len(steps)
    return (
        f"the {total:,} steps of {arm} slot {most} got the most ({steps[most] / equal:.2f} times an equal share) and "
        f"slot {least} the fewest ({steps[least] / equal:.2f} times)."
    )


def _steps(pair: dict[str, Any]) -> int:
    return sum(part["steps"] for part in pair["slices"])
