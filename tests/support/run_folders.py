"""Run folders without a run: what steps, workers and launchers write, by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

PLAN = [
    {"name": "teacher", "phase": "teacher", "arm": None, "slot": None, "needs": [], "training_steps": 100},
    {"name": "meta", "phase": "PT", "arm": None, "slot": None, "needs": ["teacher"], "training_steps": 50},
    {"name": "m2mkd/pair0", "phase": "m2mKD", "arm": "m2mkd", "slot": 0, "needs": ["meta"], "training_steps": 40},
    {"name": "m2mkd/pair1", "phase": "m2mKD", "arm": "m2mkd", "slot": 1, "needs": ["meta"], "training_steps": 40},
    {"name": "m2mkd/e2e", "phase": "E2E", "arm": "m2mkd", "slot": None, "needs": ["m2mkd/pair0", "m2mkd/pair1"]},
]
PLAN[-1]["training_steps"] = 20


class Clock:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def put(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def line(step: int, **more: Any) -> str:
    return (
        json.dumps({"step": step, "loss": 1.0 / step, "seconds": 0.5 * step, "images_per_second": 64.0, **more}) + "\n"
    )


def held(folder: Path, step: str, heartbeat: int, number: int = 1, written: float | None = None, **more: Any) -> Path:
    lease = {"owner": "a:1:x", "host": "a", "pid": 1, "heartbeat": heartbeat, "interval": 5.0, "state": "held", **more}
    path = put(folder / "steps" / step / "lease" / f"{number}.json", lease)
    if written is not None:
        os.utime(path, (written, written))
    return path


def half_done(folder: Path) -> Path:
    """A run of five steps: the teacher is finished, the meta model not yet half, its worker alive."""
    put(folder / "plan.json", PLAN)
    result = {"steps": 100, "seconds": 30.0, "metrics": {"test_accuracy": 91.25, "ood_accuracy": 40.0}}
    put(folder / "steps/teacher/result.json", result)
    put(folder / "steps/meta/metrics.jsonl", line(10) + line(20, recent_images_per_second=80.0))
    held(folder, "meta", 7)
    return folder
