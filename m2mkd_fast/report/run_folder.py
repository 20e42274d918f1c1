"""Reads a run folder: configuration, machine, and per step the result and the metrics lines.

A step is finished when its `result.json` is there. Metrics files may end in a half-written line (the process was
killed) and may repeat steps (the run was resumed from an earlier checkpoint); both are normal. A damaged `result.json`
is not: it is written atomically, so it was changed by something else and nothing that depends on it can be trusted.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2mkd_fast.errors import M2MKDError

# The path's first part decides between arms and shared steps, its last part gives the phase.
_PHASE_OF_NAME = (
    (re.compile(r"teacher"), "teacher"),
    (re.compile(r"meta"), "PT"),
    (re.compile(r"mt(\d+)"), "MT"),
    (re.compile(r"ft"), "FT"),
    (re.compile(r"hybrids"), "hybrids"),
    (re.compile(r"cache"), "cache"),
    (re.compile(r"[^/]+/round\d+/pair(\d+)"), "round"),
    (re.compile(r"[^/]+/pair(\d+)"), "m2mKD"),
    (re.compile(r"[^/]+/e2e"), "E2E"),
)


@dataclass(frozen=True)
class Step:
    """One step of a run, finished or not.

    `training` and `evaluations` hold the lines of `metrics.jsonl` in the order of their `step`, without the stretches
    that a resumed run did again; `corrupt_lines` counts the lines that are no JSON object with a `step`.
    """

    name: str
    result: dict[str, Any] | None
    training: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    corrupt_lines: int = 0

    @property
    def finished(self) -> bool:
        return self.result is not None

    @property
    def arm(self) -> str | None:
        return self.name.split("/")[0] if "/" in self.name else None

    @property
    def phase(self) -> str:
        for pattern, phase in _PHASE_OF_NAME:
            if pattern.fullmatch(self.name):
                return phase
        return str((self.result or {}).get("phase", "other"))

    @property
    def slot(self) -> int | None:
        for pattern, _ in _PHASE_OF_NAME:
            match = pattern.fullmatch(self.name)
            if match and match.groups():
                return int(match.group(1))
        return None

    @property
    def training_steps(self) -> int:
        """Optimiser steps done: of the whole step, or so far where it is unfinished."""
        done = number((self.result or {}).get("steps"))
        if done is None:
            done = max((line["step"] for line in self.training + self.evaluations), default=0)
        return int(done)

    def spent(self, quantity: str) -> float:
        """Cumulative `seconds` or `flops`: from the step's result, or from its last line where it is unfinished."""
        value = number((self.result or {}).get(quantity))
        if value is None:
            lines = (number(line.get(quantity)) for line in self.training + self.evaluations)
            value = max((v for v in lines if v is not None), default=0.0)
        return value

    def metric(self, name: str) -> float | None:
        return number(((self.result or {}).get("metrics") or {}).get(name))


@dataclass(frozen=True)
class Run:
    """One run folder as read: `config` and `info` are empty where their files are missing."""

    folder: Path
    config: dict[str, Any]
    info: dict[str, Any]
    steps: dict[str, Step]

    @property
    def seed(self) -> int | None:
        """The configuration's seed: at the top level, or the only one there is further down."""
        if isinstance(self.config.get("seed"), int):
            return self.config["seed"]
        seeds = {v for k, v in flatten(self.config).items() if k.split(".")[-1] == "seed" and isinstance(v, int)}
        return seeds.pop() if len(seeds) == 1 else None

    def pairs(self, arm: str) -> list[Step]:
        """The arm's pair steps in the order of their slots."""
        return sorted(
            (s for s in self.steps.values() if s.arm == arm and s.phase == "m2mKD"), key=lambda s: s.slot or 0
        )

    def rounds(self, arm: str) -> list[list[Step]]:
        """The steps of the arm's pairs in each round of a bandit's budget; empty under an equal one."""
        rounds: dict[int, list[Step]] = {}
        for step in self.of_phase("round"):
            if step.arm == arm:
                rounds.setdefault(int(step.name.split("/")[1].removeprefix("round")), []).append(step)
        return [rounds[index] for index in sorted(rounds)]

    def of_phase(self, phase: str) -> list[Step]:
        return [step for step in self.steps.values() if step.phase == phase]

    @property
    def slots(self) -> int:
        """Number of slots L as far as the finished and started steps show it; 0 where they do not."""
        hybrids = self.steps.get("hybrids")
        accuracies = ((hybrids.result if hybrids else None) or {}).get("metrics", {}).get("hybrid_accuracy") or []
        seen = [step.slot + 1 for step in self.steps.values() if step.slot is not None]
        return max([len(accuracies), *seen])


def number(value: object) -> float | None:
    """A finite number as float; None for anything else (a diverged loss is written as NaN, which no mean survives)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_run(folder: str | Path) -> Run:
    """Reads a whole run folder.

    Raises:
        M2MKDError: the folder is missing or is no run folder; `config.yaml`, `run.json` or a `result.json` is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise M2MKDError(f"run folder '{folder}' does not exist; give the folder that `m2mkd run` wrote")
    if not (folder / "steps").is_dir() and not (folder / "run.json").is_file():
        raise M2MKDError(
            f"'{folder}' is no run folder: it holds neither run.json nor steps/; give the folder that `m2mkd run` wrote"
        )
    steps = [_read_step(folder / "steps", path) for path in _step_folders(folder / "steps")]
    steps.sort(key=lambda step: [int(p) if i % 2 else p for i, p in enumerate(re.split(r"(\d+)", step.name))])
    info = _read_object(folder / "run.json", "restore it, or delete it to report without the machine and versions")
    return Run(folder, _read_config(folder / "config.yaml"), info, {step.name: step for step in steps})


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """(training lines, evaluation lines, number of corrupt lines) of a metrics.jsonl; a missing file has none.

    A line whose step is not beyond the one before it was written by a resumed run; it takes the place of all later
    ones.
    """
    training: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    corrupt = 0
    raw_lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for raw in raw_lines:
        if not raw.strip():
            continue
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            corrupt += 1
            continue
        step = line.get("step") if isinstance(line, dict) else None
        if isinstance(step, bool) or not isinstance(step, int):
            corrupt += 1
            continue
        is_training, is_evaluation = "loss" in line, any(key.endswith("accuracy") for key in line)
        for lines, belongs in ((training, is_training), (evaluations, is_evaluation)):
            if belongs:
                while lines and lines[-1]["step"] >= step:
                    lines.pop()
                lines.append(line)
    return training, evaluations, corrupt


def _step_folders(steps: Path) -> list[Path]:
    files = (path for name in ("result.json", "metrics.jsonl") for path in steps.rglob(name))
    return sorted({path.parent for path in files if path.parent != steps})


def _read_step(steps: Path, folder: Path) -> Step:
    path = folder / "result.json"
    result = None
    if path.is_file():
        result = _read_object(path, "delete the step's folder and run the step again")
        if not isinstance(result.get("metrics", {}), dict):
            raise M2MKDError(
                f"'{path}': \"metrics\" should be an object of numbers, found {result['metrics']!r}; "
                "delete the step's folder and run the step again"
            )
    training, evaluations, corrupt = read_metrics(folder / "metrics.jsonl")
    return Step(folder.relative_to(steps).as_posix(), result, training, evaluations, corrupt)


def _read_object(path: Path, remedy: str) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise M2MKDError(f"'{path}' is damaged: it should hold one JSON object ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise M2MKDError(f"'{path}' should hold one JSON object, found a {type(value).__name__}; {remedy}")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise M2MKDError(f"'{path}' is damaged: it should hold one YAML mapping ({error}); restore it") from error
    if value is not None and not isinstance(value, dict):
        raise M2MKDError(f"'{path}' should hold one YAML mapping, found a {type(value).__name__}; restore it")
    return value or {}
