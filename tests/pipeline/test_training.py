from __future__ import annotations

import errno
import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from m2mkd_fast import atomic
from m2mkd_fast.data import create_dataset
from m2mkd_fast.distill.pair_loss import PairLoss
from m2mkd_fast.distill.tasks import SupervisedTask, Task
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.checkpoint import Checkpoints
from m2mkd_fast.pipeline.config import DataConfig, TrainingConfig
from m2mkd_fast.pipeline.execution import Execution
from m2mkd_fast.pipeline.training import fit

CPU = Execution(device="cpu", precision="float32")


@pytest.fixture(scope="module")
def images():
    return create_dataset("digits", image_size=8, images_per_class=6).splits["train"]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.2), nn.GELU(), nn.Linear(16, 10))


def training(**changes) -> TrainingConfig:
    return TrainingConfig(**{"steps": 12, "batch_size": 8, "checkpoint_every": 4, "evaluate_every": 6, **changes})


def train(images, config, folder=None, stop_at=None, seed=3):
    """Train; with ``stop_at`` the process 'dies' when that batch is asked for."""
    model = network()
    task = SupervisedTask(model, config.label_smoothing)
    if stop_at is not None:
        task = Mortal(model, stop_at)
    data = DataConfig(augmentation="affine")
    try:
        fit(task, images, config, seed=seed, data=data, execution=CPU, folder=folder)
    except Death:
        return None
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Death(BaseException):
    """Ends a run without any of its clean-up, as far as one process can."""


class Mortal(Task):
    def __init__(self, model, stop_at):
        super().__init__(model)
        self.calls, self.stop_at = 0, stop_at

    def forward(self, images, labels):
        if self.calls == self.stop_at:
            raise Death
        self.calls += 1
        return SupervisedTask.forward(self, images, labels)

    label_smoothing = 0.1


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema_decay": 0.9}, {"mixup": 0.8, "cutmix": 1.0}, {"optimizer": "sgd"}, {"optimizer": "lamb"}],
    ids=lambda c: "-".join(c) or "plain",
)
def test_a_stopped_run_ends_with_the_same_bits(images, tmp_path, changes):
    config = training(**changes)
    whole = train(images, config, tmp_path / "whole")
    for stop_at in (1, 4, 7, 11):
        folder = tmp_path / f"stopped{stop_at}"
        assert train(images, config, folder, stop_at) is None
        random.seed(stop_at), np.random.seed(stop_at), torch.manual_seed(stop_at)
        assert torch.equal(train(images, config, folder), whole)
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(steps) and steps[-1] == 12


def test_training_does_not_depend_on_the_folder_but_on_the_seed(images, tmp_path):
    assert torch.equal(train(images, training()), train(images, training(), tmp_path))
    assert not torch.equal(train(images, training()), train(images, training(), seed=4))


def test_it_learns(images):
    model = network()
    fit(SupervisedTask(model), images, training(steps=150, batch_size=60), seed=0, execution=CPU)
    with torch.no_grad():
        pixels, labels = images.load(torch.arange(len(images)))
        assert (model.eval()(pixels).argmax(1) == labels).float().mean() > 0.9


def test_bf16_computes_products_in_bf16_and_keeps_float32_weights(images):
    seen = []

    class Watching(Mortal):
        def forward(self, images, labels):
            seen.append(self.trainable(images).dtype)
            return SupervisedTask.forward(self, images, labels)

    model = network()
    fit(Watching(model, -1), images, training(steps=2), seed=0, execution=Execution("cpu", "bf16"))
    assert seen == [torch.bfloat16] * 2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_cost_is_counted(images):
    result = fit(SupervisedTask(network()), images, training(steps=5), seed=0, execution=CPU)
    # Forward, and backward to weights of both layers and to the hidden layer; no gradient for the images.
    products = 2 * 8 * (64 * 16 + 16 * 10)
    assert result.flops == 5 * (2 * products + 2 * 8 * 16 * 10)
    assert (result.steps, result.images) == (5, 40)
    assert result.seconds > 0


def test_a_checkpoint_of_another_model_is_named_with_the_remedy(images, tmp_path):
    other = SupervisedTask(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    fit(other, images, training(steps=4), seed=0, execution=CPU, folder=tmp_path)
    with pytest.raises(
        M2MKDError, match=r"checkpoints: .*model.1.weight is \[10, 64\] in it and \[16, 64\].*delete it"
    ):
        train(images, training(), tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").load()[1]["progress"]["step"] == 4


def test_a_full_disk_leaves_the_last_checkpoint(images, tmp_path, monkeypatch):
    train(images, training(), tmp_path, stop_at=6)
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(M2MKDError, match="cannot write .*No space left.*make room.*start the same command again"):
        train(images, training(), tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before


def test_shares_are_of_the_gradient_not_of_the_loss(images):
    class Pulled(Task):
        def forward(self, images, labels):
            weights = self.trainable.weight
            steep, flat = (3 * weights).sum(), 1000 + weights.sum()
            return PairLoss(steep + flat, {"steep": steep, "flat": flat})

    result = fit(Pulled(nn.Linear(3, 1)), images, training(steps=2, evaluate_every=2), seed=0, execution=CPU)
    assert result.gradient_share == pytest.approx({"steep": 0.75, "flat": 0.25})


def test_a_missing_device_is_named():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(M2MKDError, match="device 'cuda' was asked for, but torch sees no CUDA device"):
        Execution(device="cuda").accelerator  # noqa: B018
