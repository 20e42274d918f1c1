"""The order of steps, retries and stops, with launchers that do no work."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline import dispatch as module
from m2mkd_fast.pipeline.attempt import Report
from m2mkd_fast.pipeline.dispatch import dispatch
from m2mkd_fast.pipeline.files import Failure
from m2mkd_fast.pipeline.lease import LeaseObserver, read_holder
from m2mkd_fast.pipeline.plan import Step
from m2mkd_fast.pipeline.stopping import Stopped

STEPS = [Step("a", "teacher"), Step("b", "PT", ("a",)), Step("c", "PT", ("a",)), Step("d", "E2E", ("b", "c"))]


class Bench:
    """A run folder without models."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, SimpleNamespace(meta=SimpleNamespace(max_hybrid_drop=10.0))

    def step_folder(self, name: str) -> Path:
        return self.folder / name

    def result(self, name: str) -> dict | None:
        path = self.folder / name / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def finish(self, name: str, **result) -> None:
        self.step_folder(name).mkdir(parents=True, exist_ok=True)
        (self.step_folder(name) / "result.json").write_text(json.dumps(result))


class Display:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


class Launcher:
    """Ends every step at once in the way that `ends` lists for it; finished where it lists nothing more."""

    def __init__(self, bench: Bench, jobs: int = 1, ends: dict[str, list[str]] | None = None) -> None:
        self.bench, self.jobs, self.ends = bench, jobs, ends or {}
        self.begun: list[list[str]] = []
        self.active: list[str] = []

    def room(self) -> int:
        return self.jobs - len(self.active)

    def running(self) -> list[str]:
        return self.active

    def begin(self, steps) -> None:
        self.begun.append([step.name for step, _ in steps])
        self.active += self.begun[-1]
        for step, _ in steps:
            Failure(self.bench.step_folder(step.name)).begin()

    def reports(self, seconds: float) -> list[Report]:
        names, self.active = self.active, []
        return [self.report(name) for name in names]

    def report(self, name: str) -> Report:
        kind = self.ends[name].pop(0) if self.ends.get(name) else "finished"
        if kind == "finished":
            self.bench.finish(name)
        error = M2MKDError("a wrong shape") if kind == "failed" else None
        return Report(name, kind, "its process was killed" if kind == "died" else "", error)

    def stop(self) -> None:
        self.ends = {name: ["stopped"] for name in self.active}


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


def test_steps_come_after_what_they_need_and_side_by_side_where_they_can(bench):
    launcher = Launcher(bench, jobs=2)
    dispatch(bench, STEPS, launcher, Display(), retries=0)
    assert launcher.begun == [["a"], ["b", "c"], ["d"]]


def test_what_is_done_is_not_begun(bench):
    bench.finish("a")
    bench.finish("c")
    launcher, display = Launcher(bench), Display()
    dispatch(bench, STEPS, launcher, display, retries=0)
    assert launcher.begun == [["b"], ["d"]]
    assert display.lines == ["2 of 4 steps were done before"]


def test_what_a_kill_after_the_result_left_behind_goes(bench):
    bench.finish("a")
    folder = bench.step_folder("a")
    (folder / "checkpoints").mkdir()
    for name in (".weights.safetensors.1.partial", "checkpoints/.00000002.json.1.partial", "checkpoints/00000002.json"):
        (folder / name).write_text("")
    dispatch(bench, STEPS, Launcher(bench), Display(), retries=0)
    assert {path.name for path in folder.iterdir()} == {"result.json", "lease"}
    assert not bench.step_folder("b").joinpath("lease").exists()


def test_a_step_whose_process_died_is_begun_again_so_often(bench):
    launcher, display = Launcher(bench, ends={"b": ["died", "died"]}), Display()
    dispatch(bench, STEPS, launcher, display, retries=2)
    assert launcher.begun == [["a"], ["b"], ["b"], ["b"], ["c"], ["d"]]
    assert "b: its process was killed; goes on from its last checkpoint (retry 2 of 2)" in display.lines
    bench.folder.joinpath("d", "result.json").unlink()
    with pytest.raises(M2MKDError, match=r"step d: its process was killed; that was attempt 3\. .* fewer jobs"):
        dispatch(bench, STEPS, Launcher(bench, ends={"d": ["died"] * 3}), display, retries=2)
    failure = json.loads((bench.folder / "d/failure.json").read_text())
    assert failure.keys() == {"error", "final", "host", "time", "attempts"}
    assert (failure["attempts"], failure["final"]) == (3, False)


def test_a_step_that_fails_for_good_stops_the_launcher(bench):
    launcher = Launcher(bench, jobs=2, ends={"b": ["failed"]})
    with pytest.raises(M2MKDError, match="step b: a wrong shape"):
        dispatch(bench, STEPS, launcher, Display(), retries=2)
    assert launcher.begun == [["a"], ["b", "c"]]


def test_a_request_to_stop_waits_until_what_runs_is_saved(bench, monkeypatch):
    launcher = Launcher(bench, jobs=2)
    monkeypatch.setattr(module, "stop_requested", lambda: bool(launcher.begun[1:]))
    launcher.reports = lambda seconds: Launcher.reports(launcher, seconds) if len(launcher.begun) < 2 else saved()

    def saved() -> list[Report]:
        return Launcher.reports(launcher, 0.0) if launcher.ends else []

    with pytest.raises(Stopped, match="1 of 4 steps are done"):
        dispatch(bench, STEPS, launcher, Display(), retries=0)
    assert launcher.active == []


def test_what_runs_elsewhere_is_waited_for_and_taken_over_where_its_owner_dies(bench, monkeypatch):
    """Another launcher holds `a` and finishes it, then holds `b` and dies."""
    monkeypatch.setattr(module, "_LOOK", 0.0)
    first = LeaseObserver(bench.step_folder("a") / "lease").acquire()
    launcher, display, rounds = Launcher(bench), Display(), []

    def reports(seconds: float) -> list[Report]:
        rounds.append(list(launcher.active))
        if len(rounds) == 3:
            bench.finish("a")
            first.release()
            gone = LeaseObserver(bench.step_folder("b") / "lease").acquire()
            gone._ended.set()  # no heartbeat any more
            gone._thread.join()
            dead = replace(read_holder(gone.folder), started=1)
            (gone.folder / "1.json").write_text(json.dumps(asdict(dead)))
        return Launcher.reports(launcher, seconds)

    launcher.reports = reports
    dispatch(bench, STEPS, launcher, display, retries=0)
    assert rounds[:3] == [[], [], []]
    assert launcher.begun == [["b"], ["c"], ["d"]]
    assert [line for line in display.lines if "runs elsewhere" in line and line.startswith("a: ")]


def test_the_gate_on_hybrids_holds_for_results_of_others(bench):
    steps = [Step("hybrids", "hybrids"), Step("pair", "m2mKD", ("hybrids",))]
    bench.finish("hybrids", metrics={"hybrid_accuracy": [10.0], "teacher_accuracy": 90.0})
    launcher = Launcher(bench)
    with pytest.raises(M2MKDError, match="do not speak the same language"):
        dispatch(bench, steps, launcher, Display(), retries=0)
    assert launcher.begun == []


def test_failures_are_counted_until_one_attempt_succeeds(tmp_path):
    said: list[str] = []
    for attempts in (1, 2):
        failure = Failure(tmp_path)
        failure.begin()
        assert failure.read() is None
        failure.record("too hot", True, said.append)
        assert Failure(tmp_path).read()["attempts"] == attempts
    failure = Failure(tmp_path / "full")
    failure.path.parent.write_text("")  # what stands where the folder should be is as bad as a full disk
    failure.record("too hot", False, said.append)
    assert len(said) == 1 and "cannot write" in said[0]
