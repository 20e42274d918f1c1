"""Reads files of a run folder that others may be writing: what cannot be read counts as not there yet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

_TAIL_BYTES = 1 << 16
_PACE_LINES = 20


@dataclass(frozen=True)
class Tail:
    """The end of a file of metrics."""

    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    done: int = 0
    pace: float | None = None


def read_tail(path: Path) -> Tail:
    """The last lines of a ``metrics.jsonl``; only those that matter are decoded."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, 2) - _TAIL_BYTES)
            file.seek(start)
            lines = file.read(_TAIL_BYTES).split(b"\n")
    except OSError:
        return Tail()
    lines = lines[1 if start else 0 :][::-1]
    # A training line has no loss where all its steps were left out, but always a pace.
    training = _entries((line for line in lines if b'"images_per_second"' in line), _PACE_LINES)
    evaluation = _entries((line for line in lines if b'_accuracy"' in line), 1)
    last = evaluation[0] if evaluation else {}
    if not training:
        return Tail(evaluation=last)
    return Tail(training[0], last, training[0]["step"], _pace(training[0], training[-1]))


def _entries(lines: Iterable[bytes], most: int) -> list[dict[str, Any]]:
    """The first so many lines that are entries."""
    decoded = (_object(line) for line in lines)
    return list(islice((entry for entry in decoded if count(entry.get("step")) is not None), most))


def _pace(last: Mapping[str, Any], earlier: Mapping[str, Any]) -> float | None:
    """Seconds of a training step between two lines, or from the beginning where there is but one."""
    if earlier["step"] >= last["step"]:
        earlier = {}
    steps = last["step"] - earlier.get("step", 0)
    until, since = number(last.get("seconds")), number(earlier.get("seconds")) or 0.0
    return (until - since) / steps if until is not None and steps > 0 and until > since else None


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
