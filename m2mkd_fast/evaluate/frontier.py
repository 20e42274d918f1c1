"""Accuracy and latency of several models, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.evaluate.predictions import evaluation_mode

_WARM_UP = 3


@dataclass(frozen=True)
class FrontierPoint:
    """One model's place between accuracy and speed.

    Attributes:
        name: as given.
        accuracy: per cent of the images.
        latency_ms: median time of one forward pass.
        speedup: against the first model: median of the ratios of passes made right after one another.
    """

    name: str
    accuracy: float
    latency_ms: float
    speedup: float


@torch.no_grad()
def measure_frontier(
    models: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    latency_images: Tensor | None = None,
    rounds: int = 20,
) -> list[FrontierPoint]:
    """Accuracy of every model on the same batches, and latency measured in turns.

    In every round each model makes one pass, beginning with another one each time: what slows the machine down slows
    all of them. The ratio of two passes of one round therefore says more than two times from different minutes.

    Args:
        models: by name, on one device; the first is what the others are compared with. Each is left in its mode.
        batches: images and labels; read once, one batch at a time.
        latency_images: what the passes are timed on; the images of the first batch by default.
        rounds: passes of each model that count.

    Raises:
        M2MKDError: no model, no image or no round.
    """
    if not models or rounds < 1:
        raise M2MKDError(f"there are {len(models)} models and {rounds} rounds; at least one of each is needed")
    device = next((parameter.device for parameter in next(iter(models.values())).parameters()), torch.device("cpu"))
    hits, total = dict.fromkeys(models, 0), 0
    with ExitStack() as modes:
        for model in models.values():
            modes.enter_context(evaluation_mode(model))
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            latency_images = images if latency_images is None else latency_images
            total += len(labels)
            for name, model in models.items():
                hits[name] += int((model(images).argmax(dim=-1) == labels).sum())
        if not total or not len(latency_images):
            raise M2MKDError("there is no image to evaluate or to time a pass on; give at least one batch, not empty")
        seconds = _times_in_turns(list(models.values()), latency_images.to(device), rounds)
    return [
        FrontierPoint(
            name,
            100.0 * hits[name] / total,
            1e3 * statistics.median(times),
            statistics.median(first / own for first, own in zip(seconds[0], times, strict=True)),
        )
        for name, times in zip(models, seconds, strict=True)
    ]


def _times_in_turns(models: list[nn.Module], images: Tensor, rounds: int) -> list[list[float]]:
    """Seconds of every model in every round."""
    seconds: list[list[float]] = [[] for _ in models]
    for number in range(_WARM_UP + rounds):
        for place in range(len(models)):
            index = (number + place) % len(models)
            _synchronize(images.device)
            start = time.perf_counter()
            models[index](images)
            _synchronize(images.device)
            if number >= _WARM_UP:
                seconds[index].append(time.perf_counter() - start)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
