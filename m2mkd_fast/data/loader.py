"""Batches made in worker processes, in order; a worker that dies costs time and no batch."""

from __future__ import annotations

import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from m2mkd_fast.errors import M2MKDError

RESTARTS = 3  # of the workers in a row, without a batch in between, before the run ends with an error


def load_in_workers(source: Dataset, steps: range, num_workers: int) -> Iterator[Any]:
    """``source[t]`` for each t of ``steps`` (one after another), made ahead in worker processes.

    Workers may die (killed, out of memory). As batch t is a function of t, new ones go on at the batch that is missing,
    with a warning.

    Raises:
        M2MKDError: one that the source raised; or workers died ``RESTARTS`` + 1 times without a batch in between.
        RuntimeError: the source raised something else; the message holds its traceback.
    """
    batches = None
    for t in steps:
        deaths = 0
        while True:
            try:
                with _deaths:
                    if batches is None:
                        batches = _start(source, range(t, steps.stop), num_workers)
                    _deaths.check()
                    batch = next(batches)
                break
            # The source's own errors come as values: this is the loader's, as a worker or what it was sending is gone.
            except (RuntimeError, OSError, EOFError) as error:
                reason = str(error)
            batches = None  # ends the workers that are left
            deaths += 1
            if deaths > RESTARTS:
                raise M2MKDError(
                    f"loader workers died {deaths} times in a row at batch {t} ({reason}). Memory or shared memory "
                    f"(/dev/shm; docker run --shm-size) may be short: use fewer workers with data.num_workers (now "
                    f"{num_workers}), or none with 0"
                )
            warnings.warn(f"a loader worker died ({reason}); new ones go on at batch {t}", stacklevel=2)
        if isinstance(batch, M2MKDError | _Failure):
            batches = None  # an error's traceback would hold them, and their workers
            raise (
                batch
                if isinstance(batch, M2MKDError)
                else RuntimeError(f"making batch {t} failed in a loader worker:\n{batch.text}")
            )
        yield batch


def _start(source: Dataset, steps: range, num_workers: int) -> Iterator[Any]:
    batches = iter(
        DataLoader(
            _ErrorsAsValues(source),
            batch_size=None,
            sampler=steps,
            num_workers=num_workers,
            collate_fn=_as_is,
            # Without a generator of its own the loader draws from the caller's global state.
            generator=torch.Generator(),
        )
    )
    _deaths.watch()
    return batches


class _Failure:
    """An error that is not ours, as the text of its traceback: the error itself may not survive pickling."""

    def __init__(self, text: str) -> None:
        self.text = text


class _ErrorsAsValues(Dataset):
    """Hands errors over as values: a worker would bury our messages in a foreign traceback, and what the loader then
    raises by itself is about its processes."""

    def __init__(self, source: Dataset) -> None:
        self.source = source

    def __getitem__(self, t: int) -> Any:
        try:
            return self.source[t]
        except M2MKDError as error:
            return error
        except Exception:
            return _Failure(traceback.format_exc())


def _as_is(batch: Any) -> Any:
    return batch


class _Deaths:
    """Keeps torch's notice of a dead worker out of everything but the wait for a batch.

    torch raises it from a handler of SIGCHLD, wherever the main thread is at that moment: in the middle of a training
    step, or of writing a checkpoint. Inside this context it is let through; outside it is noted for :meth:`check`.
    """

    def __init__(self) -> None:
        self._waiting = False
        self._noted = ""
        self._handler: Callable[[int, FrameType | None], Any] | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._waiting = True

    def __exit__(self, *exception: object) -> None:
        if threading.current_thread() is threading.main_thread():
            self._waiting = False

    def watch(self) -> None:
        """With workers just started: forget those before them, and stand before the handler that torch installed."""
        self._noted = ""
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
            return
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and handler != self._on_child:
            self._handler = handler
            signal.signal(signal.SIGCHLD, self._on_child)

    def check(self) -> None:
        """Raise what was noted, once. Of two loaders that work by turns it may be the other's: that costs a restart."""
        noted, self._noted = self._noted, ""
        if noted:
            raise RuntimeError(noted)

    def _on_child(self, number: int, frame: FrameType | None) -> None:
        try:
            self._handler(number, frame)
        except RuntimeError as error:
            if self._waiting:
                raise
            self._noted = str(error)  # not the error: its traceback would hold what was interrupted


_deaths = _Deaths()
