"""The board as it is shown: a table on a terminal, lines elsewhere, until the run is finished."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from run_folders import PLAN, half_done, put

from m2mkd_fast import cli
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.board import Board, Row
from m2mkd_fast.pipeline.board_table import BoardTable, most_telling, summary
from m2mkd_fast.pipeline.watch import watch

ROWS = (
    Row("teacher", state="finished", done=100, total=100, remark="test 91.2 %"),
    Row("pair0", state="running", done=20, total=100, loss=0.5, images_per_second=64.0, seconds_left=80.0, host="a"),
    Row("pair1", state="stale", total=100, host="b", remark="no sign of life for 50 s"),
    Row("e2e", total=300),
)


def terminal(width: int = 120, height: int = 40) -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, force_terminal=True, width=width, height=height), output


def drawn(board: Board, **size: int) -> list[str]:
    console, output = terminal(**size)
    console.print(BoardTable(board))
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue()).splitlines()]


def test_the_table_gives_way_to_its_figures_on_a_narrow_terminal():
    wide, narrow = drawn(Board(Path("run"), ROWS)), drawn(Board(Path("run"), ROWS), width=60)
    assert any("━" in line for line in wide) and not any("━" in line for line in narrow)
    assert any(line.endswith("b, no sign of life for 50 s") for line in wide)
    for lines in (wide, narrow):
        assert len(lines) - len(ROWS) in (4, 5)  # no row takes a second line
        (pair,) = (line for line in lines if line.startswith("pair0"))
        assert re.search(r"running .*20/100 +0\.5 +64 +1:20", pair)


def test_a_low_terminal_shows_what_matters_most():
    rows = tuple(Row(f"old{i}", state="finished") for i in range(30)) + ROWS
    lines = drawn(Board(Path("run"), rows), height=12)
    assert len(lines) < 12
    assert any(line.startswith("pair0") for line in lines) and any(line.startswith("pair1") for line in lines)
    assert any(re.fullmatch(r"and \d+ more", line) for line in lines)
    assert [row.name for row in most_telling(rows, 4)] == ["pair0", "pair1", "e2e"]
    assert most_telling(ROWS, 4) == ROWS


def test_the_summary_gives_both_times():
    pairs = tuple(Row(f"pair{i}", "m2mKD", state="ready", total=10) for i in range(3))
    teacher = Row("teacher", "teacher", state="running", done=5, total=10, pace=2.0)
    text = summary(Board(Path("run"), (teacher, *pairs)))
    assert text == (
        "0 of 4 steps finished, 1 running, 3 ready; about 20 s left on the critical path, 1:10 with 1 worker"
    )
    assert summary(Board(Path("run"))) == "no run has begun in run"


def test_off_a_terminal_each_change_is_a_line_and_it_ends_with_the_run(tmp_path):
    folder = half_done(tmp_path)
    output, naps = io.StringIO(), []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 2:  # nothing had changed at the second look
            put(folder / "steps/meta/result.json", {"steps": 50, "seconds": 25.0, "metrics": {"test_accuracy": 90.0}})
        if len(naps) == 3:
            for entry in PLAN[2:]:
                put(folder / "steps" / entry["name"] / "result.json", {"steps": 1, "seconds": 1.0, "metrics": {}})

    watch(folder, interval=0.5, console=Console(file=output, force_terminal=False, width=40), sleep=sleep)
    assert naps == [0.5, 0.5, 0.5]
    assert output.getvalue().splitlines() == [
        "teacher: finished, 100/100, test 91.2 %, ood 40.0 %",
        "meta: running on a, 20/50 (40 %), loss 0.05, 80 images/s, 15 s left",
        "m2mkd/pair0: waiting",
        "m2mkd/pair1: waiting",
        "m2mkd/e2e: waiting",
        "1 of 5 steps finished, 1 running, 3 waiting; about 39 s left on the critical path, 55 s with 1 worker",
        "meta: finished, 50/50, test 90.0 %",
        "m2mkd/pair0: ready",
        "m2mkd/pair1: ready",
        "2 of 5 steps finished, 2 ready, 1 waiting; about 24 s left on the critical path",
        "m2mkd/pair0: finished, 1/1",
        "m2mkd/pair1: finished, 1/1",
        "m2mkd/e2e: finished, 1/1",
        "5 of 5 steps finished",
    ]


def test_a_terminal_shows_one_table_until_ctrl_c(tmp_path):
    console, output = terminal()

    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    watch(half_done(tmp_path), console=console, sleep=sleep)
    assert "meta" in output.getvalue() and "91.2 %" in output.getvalue()


def test_once_looks_once(tmp_path, capsys):
    assert cli.main(["watch", str(half_done(tmp_path)), "--once"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 of 5 steps finished")
    assert cli.main(["watch", str(tmp_path / "nowhere"), "--once"]) == 0
    assert capsys.readouterr().out == f"no run has begun in {tmp_path / 'nowhere'}\n"


def test_what_cannot_be_watched_is_told(tmp_path):
    with pytest.raises(M2MKDError, match="must be positive, got 0"):
        watch(tmp_path, interval=0.0)
    with pytest.raises(M2MKDError, match="is a file"):
        watch(put(tmp_path / "config.yaml", "name: x"))


def test_nothing_is_written(tmp_path):
    folder = half_done(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    watch(folder, once=True, console=terminal()[0])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_folder_that_goes_away_is_no_error(tmp_path):
    folder, output = half_done(tmp_path / "run"), io.StringIO()

    def sleep(seconds: float) -> None:
        if not folder.exists():
            raise KeyboardInterrupt
        shutil.rmtree(folder)

    watch(folder, console=Console(file=output, force_terminal=False), sleep=sleep)
    assert output.getvalue().splitlines()[-1].startswith("no run has begun in")
