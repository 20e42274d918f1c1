"""TensorBoard and Weights & Biases, through Accelerate's trackers: they show what ``metrics.jsonl`` holds.

A tracker is company, not part of the run: what it needs is checked before any work, and where it fails later (no
network, a full disk) the run says so once and goes on without it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.pipeline.config import TRACKERS
from m2mkd_fast.pipeline.metrics import Tracker, flat_numbers

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

_PROJECT = "m2mkd_fast"  # on Weights & Biases, where WANDB_PROJECT names no other


def check_trackers(names: Sequence[str]) -> None:
    """Whether the named trackers can be started here.

    Raises:
        UnknownNameError: there is no such tracker.
        M2MKDError: its package is not installed, or Weights & Biases knows no account.
    """
    for name in names:
        if name not in TRACKERS:
            raise UnknownNameError("tracker", name, TRACKERS)
        if find_spec(name) is None:
            raise M2MKDError(
                f"trackers={list(names)} needs the package {name}, which is not installed: pip install "
                f'"m2mkd-fast[track]", or leave {name} out'
            )
    if "wandb" in names and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
        import wandb

        if wandb.api.api_key is None:
            raise M2MKDError(
                "trackers=[wandb] needs an account: run `wandb login`, or set WANDB_MODE=offline to keep its files "
                "here and send them later with `wandb sync`"
            )


@contextmanager
def open_trackers(
    names: Sequence[str], folder: Path, step: str, say: Callable[[str], None] = print
) -> Iterator[Tracker | None]:
    """What a step's metrics are handed to while the block runs; None where no tracker is asked for.

    TensorBoard's files go to ``<folder>/tensorboard/<step>``, so that ``tensorboard --logdir <folder>`` shows a run a
    step. On Weights & Biases every step is a run of the group that is called like the folder. A step that goes on
    after a stop goes on in both; what was tracked of lost work is left out.

    Args:
        names: of trackers; see :func:`check_trackers`.
        folder: of the run.
        step: name of the step.
        say: told, once, of a tracker that fails.
    """
    trackers = {name: _Tracking(name, folder, step, say) for name in names}

    def track(entry: Mapping[str, Any]) -> None:
        for tracking in trackers.values():
            tracking.log(entry)

    try:
        yield track if trackers else None
    finally:
        for tracking in trackers.values():
            tracking.finish()


class _Tracking:
    """One tracker; it starts with the first entry, which says where the step goes on."""

    def __init__(self, name: str, folder: Path, step: str, say: Callable[[str], None]) -> None:
        self.name, self.folder, self.step, self._say = name, folder, step, say
        self._tracker: GeneralTracker | None = None
        self._failed = False

    def log(self, entry: Mapping[str, Any]) -> None:
        numbers = flat_numbers(entry)
        at = int(numbers.pop("step"))
        self._do(lambda: self._started(at).log(numbers, step=at))

    def finish(self) -> None:
        if self._tracker is not None:
            self._do(self._tracker.finish)

    def _do(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # whatever a foreign service raises, training is worth more
            self._failed = True
            self._say(f"{self.step}: {self.name} failed ({type(error).__name__}: {error}); the run goes on without it")

    def _started(self, at: int) -> GeneralTracker:
        if self._tracker is None:
            tracker = _START[self.name](self.folder, self.step, at)
            tracker.start()
            self._tracker = tracker
        return self._tracker


def _tensorboard(folder: Path, step: str, at: int) -> GeneralTracker:
    from accelerate.tracking import TensorBoardTracker

    # What an earlier start tracked of this training step and of later ones was lost with them.
    return TensorBoardTracker(step, folder / "tensorboard", purge_step=at)


def _wandb(folder: Path, step: str, at: int) -> GeneralTracker:
    import wandb
    from accelerate.tracking import WandBTracker

    facts = folder / "run.json"  # with the time at which the run was begun: another one has another identity
    identity = (facts.read_bytes() if facts.exists() else str(folder.resolve()).encode()) + step.encode()
    return WandBTracker(
        os.environ.get("WANDB_PROJECT", _PROJECT),
        group=folder.name,
        name=f"{folder.name}/{step}",
        id=hashlib.sha256(identity).hexdigest()[:16],
        resume="allow",
        dir=str(folder),
        settings=wandb.Settings(silent=True, console="off"),
    )


_START: dict[str, Callable[[Path, str, int], GeneralTracker]] = {"tensorboard": _tensorboard, "wandb": _wandb}
