from __future__ import annotations

import errno
import json
import random

import numpy as np
import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from m2mkd_fast import atomic
from m2mkd_fast.data import create_dataset
from m2mkd_fast.distill.tasks import SupervisedTask, Task
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline import checkpoint, files
from m2mkd_fast.pipeline.config import DataConfig, TrainingConfig
from m2mkd_fast.pipeline.execution import Execution
from m2mkd_fast.pipeline.training import _gradient_share, fit

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


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(images, tmp_path):
    class Diverging(Mortal):
        def forward(self, images, labels):
            loss = SupervisedTask.forward(self, images, labels)
            self.calls += 1
            return loss._replace(total=loss.total * (float("nan") if self.calls == 7 else 1.0))

    with pytest.raises(M2MKDError, match="loss at step 6 is not finite.*its last checkpoint is kept.*learning rate"):
        fit(Diverging(network(), -1), images, training(), seed=0, execution=CPU, folder=tmp_path)
    model = network()
    optimizer = create_optimizer_v2(model, opt="adamw", weight_decay=0.05)
    assert checkpoint.load_checkpoint(tmp_path, model, optimizer, None).step == 4
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other model"])
def test_a_damaged_checkpoint_is_named_with_the_remedy(images, tmp_path, damage):
    train(images, training(), tmp_path, stop_at=6)
    path = tmp_path / checkpoint.NAME
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "foreign":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, path)
    else:
        other = SupervisedTask(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
        path.unlink()
        fit(other, images, training(steps=4), seed=0, execution=CPU, folder=tmp_path)
    before = path.read_bytes()
    with pytest.raises(M2MKDError, match="delete it to start this step from its beginning"):
        train(images, training(), tmp_path)
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_last_checkpoint(images, tmp_path, monkeypatch):
    train(images, training(), tmp_path, stop_at=6)
    before = (tmp_path / checkpoint.NAME).read_bytes()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(M2MKDError, match="cannot write .*No space left.*make room.*start the same command again"):
        train(images, training(), tmp_path)
    monkeypatch.undo()
    assert (tmp_path / checkpoint.NAME).read_bytes() == before
    assert [p.name for p in tmp_path.glob(".*partial")] == []


def test_metrics_of_lost_work_and_half_written_lines_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    files.MetricsFile(path, keep_until=2).append({"step": 3, "again": True})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "again": True},
    ]


def test_shares_are_of_the_gradient_not_of_the_loss(images):
    from m2mkd_fast.distill.pair_loss import PairLoss

    weight = torch.ones(3, requires_grad=True)
    steep, flat = (3 * weight).sum(), 1000 + weight.sum()
    shares = _gradient_share(PairLoss(steep + flat, {"steep": steep, "flat": flat}), [weight])
    assert shares == pytest.approx({"steep": 0.75, "flat": 0.25})


def test_a_missing_device_is_named():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(M2MKDError, match="device 'cuda' was asked for, but torch sees no CUDA device"):
        Execution(device="cuda").accelerator  # noqa: B018
