"""The pairs of a run, several at a time against one after another: the whole command, from its start to its end.

Teacher, meta model and hybrids are made first and copied, so that only the pairs are timed, with what it costs to start
processes, to check the configuration and to read the models.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from _paired import Ratio, Results, bootstrap_interval

from m2mkd_fast.pipeline.config import load_config
from m2mkd_fast.pipeline.run import run

CONFIG = Path(__file__).parent.parent / "configs" / "digits_vmoe.yaml"


def distill(config: Path, folder: Path, *arguments: str) -> float:
    """Seconds that `m2mkd distill` takes with its output in a folder."""
    command = [sys.executable, "-m", "m2mkd_fast", "distill", str(config), f"output={folder}", *arguments]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def measure(jobs: int, pairs: int, overrides: Sequence[str] = (), config: Path = CONFIG) -> Ratio:
    """`--jobs N` against `--jobs 1`, in turns."""
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        run(load_config(config, [*overrides, f"output={base}"]), jobs=1, only=lambda step: step.name == "hybrids")
        times: dict[int, list[float]] = {1: [], jobs: []}
        for number in range(pairs):
            for count in (1, jobs) if number % 2 == 0 else (jobs, 1):
                folder = Path(temporary) / f"{number}-{count}"
                shutil.copytree(base, folder)
                times[count].append(distill(config, folder, "--jobs", str(count), *overrides))
    ratios = [one / several for one, several in zip(times[1], times[jobs], strict=True)]
    seconds = [1e3 * statistics.median(times[count]) for count in (1, jobs)]
    name = f"pairs of {config.stem}, {jobs} at a time, against one after another"
    return Ratio(name, statistics.median(ratios), *bootstrap_interval(ratios), *seconds, pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    options = parser.parse_args()
    results = Results(options.json)
    results.add(measure(options.jobs, options.pairs, options.overrides, options.config))


if __name__ == "__main__":
    main()
