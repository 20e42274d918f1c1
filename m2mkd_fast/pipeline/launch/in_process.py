"""One step after another in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from m2mkd_fast.pipeline.attempt import Report, attempt
from m2mkd_fast.pipeline.plan import Step
from m2mkd_fast.pipeline.progress import Progress
from m2mkd_fast.pipeline.workbench import Workbench


class InProcess:
    """The launcher of ``--jobs 1``: a step is over when :meth:`begin` comes back."""

    def __init__(self, bench: Workbench, display: Progress) -> None:
        self.bench, self.display = bench, display
        self._reports: list[Report] = []

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        return None

    def room(self) -> int:
        return 1

    def running(self) -> Sequence[str]:
        return ()

    def begin(self, steps: Sequence[tuple[Step, int]]) -> None:
        for step, after in steps:
            self._reports.append(attempt(self.bench, step, self.display, after))

    def reports(self, seconds: float) -> Sequence[Report]:
        if not self._reports:
            time.sleep(seconds)  # others are at work
        reports, self._reports = self._reports, []
        return reports

    def stop(self) -> None:
        """Nothing to do: while a step runs nobody can call this, and the step looks for the request itself."""
