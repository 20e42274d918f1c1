"""Reads files of a run folder that others may be writing: what cannot be read counts as not there yet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Tail:
    """The end of a file of metrics."""

    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    done: int = 0
    pace: float | None = None


def read_tail(path: Path) -> Tail:
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, 2) - _TAIL_BYTES)
            file.seek(start)
            lines = file.read(_TAIL_BYTES).split(b"\n")
    except OSError:
        return Tail()
    entries = [_object(line) for line in lines[1 if start else 0 :]]
    entries = [entry for entry in entries if count(entry.get("step")) is not None]
    training = [entry for entry in entries if "images_per_second" in entry]  # without a loss if all steps were left out
    evaluations = [entry for entry in entries if accuracies(entry)]
    evaluation = evaluations[-1] if evaluations else {}
    if not training:
        return Tail(evaluation=evaluation)
    return Tail(training[-1], evaluation, training[-1]["step"], _pace(training))


def _pace(training: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds of a training step over the last lines, or from the beginning where there is but one."""
    last, before = training[-1], next((entry for entry in training if entry["step"] < training[-1]["step"]), {})
    seconds, earlier = number(last.get("seconds")), number(before.get("seconds")) or 0.0
    steps = last["step"] - before.get("step", 0)
    return (seconds - earlier) / steps if seconds is not None and steps > 0 and seconds > earlier else None


def accuracies(metrics: Any) -> str:
    """`test 91.2 %, ood 40.3 %`; of several numbers, such as the hybrids', the least and the greatest."""
    if not isinstance(metrics, dict):
        return ""
    shown = []
    for name, value in metrics.items():
        numbers = [number(item) for item in (value if isinstance(value, list) else [value])]
        if not name.endswith("_accuracy") or name.startswith("cold_") or not numbers or None in numbers:
            continue
        least, greatest = (f"{bound:.1f}" for bound in (min(numbers), max(numbers)))
        span = least if len(numbers) == 1 else f"{least} to {greatest}"
        shown.append(f"{name.removesuffix('_accuracy')} {span} %")
    return ", ".join(shown)


def count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def signature(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced; None where there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns, facts.st_size


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # vanished, or half written
        return None


def read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    return value if isinstance(value, dict) else {}


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
