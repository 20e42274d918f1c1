from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.evaluate import measure_frontier


class Answers(nn.Module):
    """Gives class `answer` to every image, after a while; remembers the order of calls."""

    def __init__(self, answer: int, seconds: float = 0.0, calls: list[tuple[int, int]] | None = None) -> None:
        super().__init__()
        self.answer, self.seconds, self.calls = answer, seconds, [] if calls is None else calls

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.calls.append((self.answer, len(images)))
        time.sleep(self.seconds)
        return torch.eye(3)[[self.answer] * len(images)]


def batches(sizes: tuple[int, ...] = (4, 2)):
    """A generator: it can be read once. Half of the images are of class 0, the others of 1."""
    for size in sizes:
        yield torch.zeros(size, 1), torch.arange(size) % 2


def test_accuracy_and_the_ratio_of_times() -> None:
    models = {"slow": Answers(0, 0.02), "fast": Answers(2, 0.005)}
    slow, fast = measure_frontier(models, batches(), rounds=5)
    assert (slow.name, slow.accuracy, slow.speedup) == ("slow", 50.0, 1.0)
    assert (fast.name, fast.accuracy) == ("fast", 0.0)
    assert slow.latency_ms >= 20 and 5 <= fast.latency_ms < slow.latency_ms
    assert 1.5 < fast.speedup < 4.5
    assert all(model.training for model in models.values()), "modes are given back"


def test_models_take_turns_on_the_images_given() -> None:
    calls: list[tuple[int, int]] = []
    models = {str(i): Answers(i, calls=calls) for i in range(3)}
    measure_frontier(models, batches((2,)), latency_images=torch.zeros(7, 1), rounds=4)
    assert [size for _, size in calls] == [2] * 3 + [7] * 3 * (3 + 4)
    rounds = [tuple(answer for answer, _ in calls[i : i + 3]) for i in range(3, len(calls), 3)]
    assert set(rounds) == {(0, 1, 2), (1, 2, 0), (2, 0, 1)}


@pytest.mark.parametrize(
    ("models", "sizes", "options", "message"),
    [
        ({}, (4,), {}, "0 models"),
        ({"a": Answers(0)}, (), {}, "no image"),
        ({"a": Answers(0)}, (4,), {"rounds": 0}, "0 rounds"),
        ({"a": Answers(0)}, (4,), {"latency_images": torch.zeros(0, 1)}, "no image"),
    ],
)
def test_mistakes_are_said(models, sizes, options, message) -> None:
    with pytest.raises(M2MKDError, match=message):
        measure_frontier(models, batches(sizes), **options)
