"""A run folder as it is while others write into it, and how long the rest will take."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from run_folders import PLAN, Clock, half_done, held, line, put
from tiny_run import tiny

from m2mkd_fast.pipeline.board import BoardReader
from m2mkd_fast.pipeline.config import make_config
from m2mkd_fast.pipeline.files import Failure
from m2mkd_fast.pipeline.lease import LeaseObserver
from m2mkd_fast.pipeline.opening import open_run_folder
from m2mkd_fast.pipeline.plan import plan
from m2mkd_fast.pipeline.schedule import critical_path, finishing_time
from m2mkd_fast.pipeline.workbench import Workbench


@pytest.fixture
def folder(tmp_path) -> Path:
    return half_done(tmp_path)


def rows(folder: Path, **clocks: Any) -> dict[str, Any]:
    return {row.name: row for row in BoardReader(folder, **clocks).read().rows}


def test_accuracies_are_shown_from_before_the_first_step(folder):
    put(folder / "steps/meta/metrics.jsonl", '{"step": 0, "test_accuracy": 10.0}\n')
    assert (rows(folder)["meta"].done, rows(folder)["meta"].remark) == (0, "test 10.0 %")
    metrics = {"hybrid_accuracy": [88.0, 71.5, 90.0], "teacher_accuracy": 92.0, "cold_test_accuracy": 5.0}
    put(folder / "steps/meta/result.json", {"steps": 0, "metrics": metrics})
    assert rows(folder)["meta"].remark == "hybrid 71.5 to 90.0 %, teacher 92.0 %"


def test_every_step_has_its_state(folder):
    put(folder / "steps/m2mkd/pair1/failure.json", {"error": "no room\nmore", "host": "b", "time": 1.0, "attempts": 3})
    found = rows(folder)
    states = {name: row.state for name, row in found.items()}
    assert states == {
        "teacher": "finished",
        "meta": "running",
        "m2mkd/pair0": "waiting",
        "m2mkd/pair1": "failed",
        "m2mkd/e2e": "waiting",
    }
    teacher, meta, failed = found["teacher"], found["meta"], found["m2mkd/pair1"]
    assert (teacher.done, teacher.total, teacher.remark) == (100, 100, "test 91.2 %, ood 40.0 %")
    assert (meta.done, meta.total, meta.loss, meta.images_per_second, meta.host) == (20, 50, 0.05, 80.0, "a")
    assert meta.seconds_left == pytest.approx(15.0)
    assert (failed.remark, failed.host) == ("no room", "b")


def test_what_is_released_waits_for_a_worker(folder):
    held(folder, "meta", 8, number=2, state="released")
    meta = rows(folder)["meta"]
    assert (meta.state, meta.done, meta.images_per_second) == ("ready", 20, None)


def test_the_lease_with_the_highest_number_counts(folder):
    held(folder, "meta", 1, number=10, host="c")
    assert rows(folder)["meta"].host == "c"


def test_a_silent_worker_is_told_by_its_heartbeat_not_by_clocks(folder):
    clock, wall = Clock(), Clock(1000.0)
    reader = BoardReader(folder, clock=clock, wall=wall)

    def meta():
        return next(row for row in reader.read().rows if row.name == "meta")

    held(folder, "meta", 7, written=990.0)
    assert meta().state == "running"
    clock.now = 25.0
    assert (meta().state, meta().remark) == ("stale", "no sign of life for 35 s")
    held(folder, "meta", 8, written=5.0)  # alive, and its machine's clock is far behind
    assert meta().state == "running"
    clock.now, wall.now = 54.0, 9e9  # this machine's clock jumps
    assert meta().state == "running"
    clock.now = 55.5
    assert meta().state == "stale"


def test_a_run_that_has_not_begun_has_no_rows(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        board = BoardReader(folder).read()
        assert (board.rows, board.finished, board.seconds_left()) == ((), False, None)


def test_a_run_without_a_plan_shows_what_it_has_begun(folder):
    (folder / "plan.json").unlink()
    found = rows(folder)
    assert list(found) == ["meta", "teacher"]
    assert (found["meta"].done, found["meta"].total, found["meta"].seconds_left) == (20, None, None)


def test_half_written_and_foreign_files_are_not_there_yet(folder):
    put(folder / "steps/meta/metrics.jsonl", line(10) + '7\n[]\n{"step": "x", "loss": 1}\n{"step": 20, "lo')
    put(folder / "steps/meta/lease/2.json", '{"state": "he')
    put(folder / "steps/meta/lease/note.txt", "no lease")
    put(folder / "steps/m2mkd/pair0/result.json", "")
    put(folder / "steps/m2mkd/pair1/failure.json", "[1]")
    found = rows(folder)
    assert (found["meta"].state, found["meta"].done) == ("running", 10)
    assert found["m2mkd/pair0"].state == found["m2mkd/pair1"].state == "waiting"
    put(folder / "plan.json", json.dumps(PLAN)[:-5])
    assert list(rows(folder)) == ["m2mkd/pair0", "meta", "teacher"]


def test_only_the_end_of_a_file_is_read_and_only_when_it_has_changed(folder, monkeypatch):
    path = put(folder / "steps/meta/metrics.jsonl", "x" * (1 << 20) + "\n" + line(30))
    read, opened = [], Path.open

    class Counted:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def seek(self, *place):
            return self.file.seek(*place)

        def read(self, size=-1):
            read.append(self.file.read(size))
            return read[-1]

    def opening(self, *arguments, **options):
        file = opened(self, *arguments, **options)
        return Counted(file) if self == path else file

    monkeypatch.setattr(Path, "open", opening)
    reader = BoardReader(folder)
    for _ in range(3):
        assert next(row for row in reader.read().rows if row.name == "meta").done == 30
    assert [len(text) for text in read] == [1 << 16]


def test_a_file_that_vanishes_while_it_is_read_is_no_error(folder, monkeypatch):
    def vanished(self, *arguments, **options):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_bytes", vanished)
    assert rows(folder)["meta"].state == "ready"
    monkeypatch.setattr(Path, "open", vanished)
    assert rows(folder)["meta"].done == 0


def test_the_time_left_is_that_of_the_critical_path_or_of_the_workers(folder):
    board = BoardReader(folder).read()
    # meta: 30 steps of 0.5 s; pairs 40 and e2e 20 steps at the mean of the paces known, (0.3 + 0.5) / 2
    assert board.seconds_left() == pytest.approx(15 + 16 + 8)
    assert board.workers == 1
    assert board.seconds_left(1) == pytest.approx(15 + 2 * 16 + 8)
    assert board.seconds_left(2) == pytest.approx(board.seconds_left())
    for name, phase in ((row.name, row.phase) for row in board.rows):
        put(folder / "steps" / name / "result.json", {"steps": 1, "seconds": 1.0, "metrics": {}, "phase": phase})
    ended = BoardReader(folder).read()
    assert ended.finished and ended.seconds_left() == ended.seconds_left(3) == 0.0


def test_the_pace_is_that_of_the_last_lines(folder):
    """Two hundred quick steps, then twenty lines of slow ones; a line without a loss is one, too."""
    quick = [line(10 * i, seconds=1.0 * i) for i in range(1, 21)]
    slow = [line(200 + 10 * i, seconds=20.0 + 50.0 * i) for i in range(1, 21)]
    put(folder / "plan.json", [{**PLAN[1], "training_steps": 410, "needs": []}])
    put(folder / "steps/meta/metrics.jsonl", "".join([*quick, *slow[:-1], slow[-1].replace('"loss"', '"gone"')]))
    meta = rows(folder)["meta"]
    assert (meta.done, meta.loss, meta.seconds_left) == (400, None, pytest.approx(50.0))


def test_a_budget_may_give_a_step_more_than_was_planned(folder):
    put(folder / "steps/meta/metrics.jsonl", line(60))
    meta = rows(folder)["meta"]
    assert (meta.done, meta.total, meta.seconds_left) == (60, 60, 0.0)


def test_schedules():
    needs = {"a": [], "b": [], "c": ["a"], "d": ["a", "b", "elsewhere"]}
    seconds = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 5.0}
    assert critical_path(seconds, needs) == 8.0
    assert finishing_time(seconds, needs, 1) == 11.0
    assert finishing_time(seconds, needs, 2) == 8.0
    # whoever works on b already goes on with it, so that a begins later
    assert finishing_time({**seconds, "b": 4.0}, needs, 1, running=["b"]) == 14.0
    assert finishing_time({"a": 2.0, "b": 2.0, "c": 4.0}, {"a": [], "b": [], "c": []}, 2, running=["b", "c"]) == 4.0
    assert finishing_time({}, {}, 1) == 0.0


def test_the_board_reads_what_a_run_writes(tmp_path):
    """The plan, leases and failures as they are really written, not as this file writes them."""
    config = make_config([tiny(output=str(tmp_path), arms=["m2mkd"])])
    steps = plan(config, 3)
    open_run_folder(Workbench(config, tmp_path), steps, 3)
    Failure(tmp_path / "steps/meta").record("it cannot be", True, print)
    with LeaseObserver(tmp_path / "steps/teacher/lease").acquire():
        found = rows(tmp_path)
        assert [(row.name, row.needs, row.total) for row in found.values()] == [
            (step.name, step.needs, 0 if step.phase == "hybrids" else 4) for step in steps
        ]
        assert (found["teacher"].state, found["teacher"].host) == ("running", socket.gethostname())
        assert (found["meta"].state, found["meta"].remark) == ("failed", "it cannot be")
        assert {found[name].state for name in found.keys() - {"teacher", "meta"}} == {"waiting"}
    assert rows(tmp_path)["teacher"].state == "ready"
