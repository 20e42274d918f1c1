"""How far a training run has come, and what it has cost."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrainingProgress:
    """Kept in every checkpoint. Losses and gradient shares are those last logged; seconds and FLOPs add up."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    flops_per_step: float | None = None  # counted in the first step
    skipped: int = 0
    terms: dict[str, float] = field(default_factory=dict)
    gradient_share: dict[str, float] = field(default_factory=dict)


@dataclass
class FitResult:
    """What a training run cost and where it ended; ``skipped`` counts the steps left out for want of a finite loss."""

    steps: int
    images: int
    seconds: float
    flops: float
    skipped: int = 0
    terms: dict[str, float] = field(default_factory=dict)
    gradient_share: dict[str, float] = field(default_factory=dict)
