"""Stopping on request: a signal asks, the training loop saves and stops, and the exit code says that it is to go on."""

from __future__ import annotations

import signal
import threading
from contextlib import ExitStack
from types import FrameType

from m2mkd_fast.errors import M2MKDError

EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: not done, the same command goes on; SLURM's RequeueExit takes it

# Those that schedulers send ahead of the end; a system lacks some of them.
_ASKING = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]

_requested = False  # a plain flag: a signal may arrive while a lock is held


class Stopped(M2MKDError):
    """Work was stopped on request after it was saved; the same command goes on from there."""


def stop_requested() -> bool:
    """Whether this process was asked to stop."""
    return _requested


def request_stop() -> None:
    """Ask this process to save and stop, as a signal does."""
    global _requested
    _requested = True


def handle_stop_signals() -> ExitStack:
    """From now on SIGTERM, SIGUSR1, SIGUSR2 and the first SIGINT call :func:`request_stop`.

    A second SIGINT raises KeyboardInterrupt at once. A worker process calls this when it starts; as a context
    (``with handle_stop_signals(): ...``) it puts the earlier handlers back and forgets the request at the end. Outside
    the main thread, where Python allows no handlers, signals stay as they are.
    """
    handlers = ExitStack()
    if threading.current_thread() is not threading.main_thread():
        return handlers
    interrupts = 0

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            raise KeyboardInterrupt
        request_stop()

    handlers.callback(_forget)
    for number in _ASKING:
        handlers.callback(signal.signal, number, signal.signal(number, lambda *_: request_stop()))
    handlers.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, interrupt))
    return handlers


def _forget() -> None:
    global _requested
    _requested = False
