"""Loader workers that die, and errors in them: no batch is lost, none comes twice, and every error is told."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from torch.utils.data import Dataset

from m2mkd_fast.data.loader import RESTARTS, load_in_workers
from m2mkd_fast.errors import M2MKDError, UnknownNameError


class Deadly(Dataset):
    """Batch t is t; the worker that makes a batch of ``deaths`` dies at it, as often as is asked for."""

    def __init__(self, folder, deaths: dict[int, int], number: int = signal.SIGKILL) -> None:
        self.folder, self.deaths, self.number = folder, deaths, number

    def __getitem__(self, t):
        died = self.folder / f"{t}"
        before = len(died.read_bytes()) if died.exists() else 0
        if before < self.deaths.get(t, 0):
            time.sleep(0.1)  # what the worker made before is to arrive: it goes through the worker
            died.write_bytes(b"." * (before + 1))
            os.kill(os.getpid(), self.number)
            time.sleep(60)
        return torch.tensor([t])


def collect(source, stop, num_workers=2, start=0):
    return [int(batch) for batch in load_in_workers(source, range(start, stop), num_workers)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_workers_that_die_cost_no_batch_and_are_reported(tmp_path, number):
    with pytest.warns(UserWarning, match=r"a loader worker died .*; new ones go on at batch \d") as told:
        batches = collect(Deadly(tmp_path, {3: 1, 7: 2}, number), 9, start=1)
    assert batches == list(range(1, 9))
    assert 2 <= len(told) <= 3


@pytest.mark.filterwarnings("ignore:a loader worker died")
def test_workers_that_die_again_and_again_end_the_run(tmp_path):
    with pytest.raises(M2MKDError, match=r"died 4 times in a row at batch 0 .*shm.*data.num_workers \(now 1\)"):
        collect(Deadly(tmp_path, {0: RESTARTS + 1}), 2, num_workers=1)


def test_a_death_while_nobody_waits_disturbs_nobody(tmp_path):
    """The main thread is at other work when it happens: it must not be thrown out of that."""
    batches = load_in_workers(Deadly(tmp_path, {1: 1}), range(2), 1)
    assert int(next(batches)) == 0
    deadline = time.monotonic() + 10
    while not (tmp_path / "1").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)  # torch's notice comes in here
    with pytest.warns(UserWarning, match="go on at batch 1"):
        assert int(next(batches)) == 1


class Raising(Dataset):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, t):
        if t == 1:
            raise self.error
        return torch.tensor([t])


def test_an_error_of_ours_arrives_as_it_is():
    with pytest.raises(UnknownNameError, match="unknown image 'cart'; did you mean 'cat'"):
        collect(Raising(UnknownNameError("image", "cart", ["cat"])), 3)


@pytest.mark.filterwarnings("error")  # no word of dead workers
def test_a_foreign_error_arrives_with_its_traceback():
    with pytest.raises(
        RuntimeError, match=r"making batch 1 failed in a loader worker:(.|\n)*raise self.error(.|\n)*lost"
    ):
        collect(Raising(OSError("lost")), 3)
