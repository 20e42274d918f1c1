"""Trackers show what metrics.jsonl holds, and stop nothing."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate import PartialState

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.pipeline import trackers
from m2mkd_fast.pipeline.config import make_config
from m2mkd_fast.pipeline.trackers import check_trackers, open_trackers

needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")


@pytest.fixture(autouse=True)
def on_cpu() -> None:
    PartialState(cpu=True)  # as fit does before a tracker starts


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_without_trackers_there_is_none(tmp_path):
    with open_trackers([], tmp_path, "teacher") as tracker:
        assert tracker is None


@needs_tensorboard
def test_tensorboard_holds_what_was_tracked_without_lost_work(tmp_path):
    with open_trackers(["tensorboard"], tmp_path, "m2mkd/pair0") as tracker:
        for step in (10, 20, 30):
            tracker({"step": step, "loss": 1.0 / step, "terms": {"task": 0.5}, "expert_load": {"blocks.1": [0.5, 0.5]}})
    assert scalars(tmp_path / "tensorboard/m2mkd/pair0")["terms.task"] == [(10, 0.5), (20, 0.5), (30, 0.5)]
    with open_trackers(["tensorboard"], tmp_path, "m2mkd/pair0") as tracker:  # killed, and on from step 10
        tracker({"step": 20, "loss": 2.0})
    found = scalars(tmp_path / "tensorboard/m2mkd/pair0")
    assert found.keys() == {"loss", "terms.task"}
    assert found["loss"] == [(10, pytest.approx(0.1)), (20, 2.0)]


def test_a_tracker_that_fails_is_left_out_and_told_once(tmp_path, monkeypatch):
    said, seen = [], []

    class Failing:
        def __init__(self, at: int) -> None:
            self.at = at

        def start(self) -> None:
            seen.append("start")

        def log(self, values: dict, step: int) -> None:
            seen.append((step, values))
            if step >= self.at:
                raise OSError("no space left on device")

        def finish(self) -> None:
            seen.append("finish")

    monkeypatch.setitem(trackers._START, "tensorboard", lambda folder, step, at: Failing(20))
    with open_trackers(["tensorboard"], tmp_path, "teacher", said.append) as tracker:
        for step in (10, 20, 30):
            tracker({"step": step, "loss": 1.0})
    assert seen == ["start", (10, {"loss": 1.0}), (20, {"loss": 1.0})]
    assert said == ["teacher: tensorboard failed (OSError: no space left on device); the run goes on without it"]


def test_a_tracker_is_ended_where_training_stops_with_an_error(tmp_path, monkeypatch):
    ended = []

    class Quiet:
        def start(self) -> None: ...

        def log(self, values: dict, step: int) -> None: ...

        def finish(self) -> None:
            ended.append(True)

    monkeypatch.setitem(trackers._START, "wandb", lambda folder, step, at: Quiet())

    def stopped() -> None:
        with open_trackers(["wandb"], tmp_path, "teacher") as tracker:
            tracker({"step": 1})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert ended == [True]


def test_what_is_missing_is_told_before_any_work(monkeypatch):
    check_trackers([])
    with pytest.raises(UnknownNameError, match="did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])
    with pytest.raises(UnknownNameError, match="unknown tracker 'wandb2'.*did you mean 'wandb'"):
        make_config([{"trackers": ["wandb2"]}])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(M2MKDError, match=r'needs the package wandb.*pip install "m2mkd-fast\[track\]"'):
        check_trackers(["wandb"])


@pytest.fixture
def fresh_wandb():
    import wandb

    wandb.teardown()  # it reads the environment once
    yield
    wandb.teardown()


@pytest.mark.slow
@needs_wandb
def test_weights_and_biases_without_an_account_is_told(monkeypatch, tmp_path, fresh_wandb):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(M2MKDError, match=r"wandb login.*WANDB_MODE=offline"):
        check_trackers(["wandb"])


@pytest.mark.slow
@needs_wandb
def test_weights_and_biases_keeps_a_run_a_step(tmp_path, monkeypatch, fresh_wandb):
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])
    said = []
    (tmp_path / "run.json").write_text(json.dumps({"created": "then"}))
    for step in ("teacher", "m2mkd/pair0"):
        with open_trackers(["wandb"], tmp_path, step, said.append) as tracker:
            tracker({"step": 10, "loss": 0.5, "terms": {"task": 0.25}})
    assert said == []
    files = sorted(path for path in tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len({path.name for path in files}) == 2  # identities of their own
    assert all(os.path.getsize(path) > 0 and b"terms.task" in path.read_bytes() for path in files)
