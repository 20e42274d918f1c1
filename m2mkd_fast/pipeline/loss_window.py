"""Losses of the last steps: they stay on the device until the host looks at all of them at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from m2mkd_fast.pipeline.execution import Execution
from m2mkd_fast.pipeline.optimizer_step import Outcome


@dataclass(frozen=True)
class StepLoss:
    """One step as the host sees it: mean loss and terms over the processes, and whether the step was left out.

    Attributes:
        counts: it was left out because of the loss or its gradient, and not to find the scale of fp16's gradients.
    """

    step: int
    loss: float
    terms: dict[str, float]
    left_out: bool
    counts: bool


class LossWindow:
    """The steps since the last log. ``as_json`` goes into checkpoints, so that a log does not depend on interruptions.

    Args:
        execution: over whose processes losses are averaged.
        kept: what ``as_json`` gave.
    """

    def __init__(self, execution: Execution, kept: Iterable[dict[str, Any]] = ()) -> None:
        self.execution = execution
        self._read = [StepLoss(**step) for step in kept]
        self._unread: list[tuple[int, Outcome]] = []

    def add(self, t: int, outcome: Outcome) -> None:
        self._unread.append((t, outcome))

    def read(self) -> list[StepLoss]:
        """Wait for the device; the steps that were not read before."""
        if not self._unread:
            return []
        outcomes = [outcome for _, outcome in self._unread]
        names = list(outcomes[0].terms)
        values = torch.stack([value.double() for o in outcomes for value in (o.total, *o.terms.values())])
        flags = torch.stack([flag for o in outcomes for flag in (o.left_out, o.counts)]).cpu().view(-1, 2).tolist()
        rows = self.execution.mean(values).cpu().view(len(outcomes), -1).tolist()
        new = [
            StepLoss(t, loss, dict(zip(names, terms, strict=True)), left_out, counts)
            for (t, _), (loss, *terms), (left_out, counts) in zip(self._unread, rows, flags, strict=True)
        ]
        self._read += new
        self._unread.clear()
        return new

    def take(self) -> tuple[float | None, dict[str, float]]:
        """Mean loss and terms of the steps that were read and not left out; (None, {}) without such. Empties itself."""
        kept = [step for step in self._read if not step.left_out]
        self._read.clear()
        if not kept:
            return None, {}
        return _mean([step.loss for step in kept]), {
            name: _mean([step.terms[name] for step in kept]) for name in kept[0].terms
        }

    def as_json(self) -> list[dict[str, Any]]:
        """The steps that were read and not taken. One that was left out keeps no loss: JSON has no NaN."""
        return [asdict(step) | ({"loss": 0.0, "terms": {}} if step.left_out else {}) for step in self._read]


def _mean(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).mean().item()
