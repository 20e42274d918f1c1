"""How well each phase used its machine: pace, model-FLOP utilisation, memory, steps that were left out."""

from __future__ import annotations

from statistics import median
from typing import Any

from m2mkd_fast.report.costs import PHASES
from m2mkd_fast.report.run_folder import Run, Step, number
from m2mkd_fast.report.units import MISSING, significant


def throughput_of_run(run: Run) -> dict[str, dict[str, float | None]]:
    """Per phase that has trained: None for what its steps do not hold, as those of older runs.

    - ``images_per_second``: images over seconds of training, of the finished steps together;
    - ``model_flop_utilisation``: median over the logged lines;
    - ``peak_memory_bytes``: the most that a step's process held;
    - ``skipped_steps``: left out for a loss or gradient that was not finite, of all steps together.
    """
    found = {}
    for phase in ("teacher", *PHASES):
        steps = [step for step in run.of_phase(phase) if step.training_steps]
        if steps:
            utilisation = _logged(steps, "model_flop_utilisation")
            found[phase] = {
                "images_per_second": _images_per_second(steps),
                "model_flop_utilisation": median(utilisation) if utilisation else None,
                "peak_memory_bytes": max(_logged(steps, "peak_memory_bytes"), default=None),
                "skipped_steps": _skipped(steps),
            }
    return found


def throughput_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of the report's table on it; the first column is the run."""
    heads = ["run", "phase", "images/s", "model-FLOP utilisation (%)", "peak memory (GiB)", "steps left out"]
    rows = [
        [
            run["folder"],
            phase,
            _text(facts["images_per_second"]),
            _text(facts["model_flop_utilisation"], 100),
            _text(facts["peak_memory_bytes"], 2**-30),
            MISSING if facts["skipped_steps"] is None else f"{facts['skipped_steps']:,}",
        ]
        for run, cost in zip(results["runs"], results["cost"]["runs"], strict=True)
        for phase, facts in cost["throughput"].items()
    ]
    return heads, rows


def _text(value: float | None, factor: float = 1.0) -> str:
    return MISSING if value is None else significant(factor * value)


def _images_per_second(steps: list[Step]) -> float | None:
    finished = [step.result for step in steps if step.result]
    images = sum(number(result.get("images")) or 0.0 for result in finished)
    seconds = sum(number(result.get("seconds")) or 0.0 for result in finished)
    return images / seconds if images and seconds else None


def _logged(steps: list[Step], key: str) -> list[float]:
    values = (number(line.get(key)) for step in steps for line in step.training)
    return [value for value in values if value is not None]


def _skipped(steps: list[Step]) -> int | None:
    """From the results, or from the last line of a step that is not finished; None where nothing counts them."""
    counts = []
    for step in steps:
        lines = [step.result] if step.result else step.training[::-1]
        counts.append(next((count for line in lines if (count := number(line.get("skipped"))) is not None), None))
    known = [count for count in counts if count is not None]
    return int(sum(known)) if known else None
