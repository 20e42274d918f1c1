from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.report import read_run
from m2mkd_fast.report.run_folder import read_metrics


def test_a_complete_run_is_read(complete_run: Path) -> None:
    run = read_run(complete_run)
    assert run.seed == 0
    assert run.slots == 4
    assert run.info["commit"] == "0123abcd"
    assert all(step.finished for step in run.steps.values())
    pair = run.steps["m2mkd/pair2"]
    assert (pair.arm, pair.phase, pair.slot, pair.training_steps) == ("m2mkd", "m2mKD", 2, 200)
    assert len(pair.training) == 200
    assert pair.evaluations == []
    assert run.steps["m2mkd/e2e"].evaluations[0]["test_accuracy"] == 63.8


def test_slots_beyond_ten_are_in_numerical_order(tmp_path: Path, run_writer: type) -> None:
    writer = run_writer(tmp_path / "run", slots=12)
    for slot in reversed(range(12)):
        writer.pair("m2mkd", slot, steps=2)
    run = read_run(writer.folder)
    assert [step.slot for step in run.pairs("m2mkd")] == list(range(12))
    assert list(run.steps) == [f"m2mkd/pair{slot}" for slot in range(12)]


def test_a_missing_folder_and_a_folder_that_is_no_run_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(M2MKDError, match=r"'.*nowhere' does not exist; give the folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(M2MKDError, match=r"is no run folder: it holds neither run.json nor steps/"):
        read_run(tmp_path)


@pytest.mark.parametrize("damage", ["", '{"step": "meta", ', "[1, 2]", '{"metrics": 3}', "\xff"])
def test_a_damaged_result_names_its_file(tmp_path: Path, run_writer: type, damage: str) -> None:
    writer = run_writer(tmp_path / "run")
    writer.meta()
    (writer.folder / "steps/meta/result.json").write_bytes(damage.encode("latin-1"))
    with pytest.raises(M2MKDError, match=r"steps/meta/result.json'.*run the step again"):
        read_run(writer.folder)


def test_damaged_run_json_and_config_name_their_files(tmp_path: Path, run_writer: type) -> None:
    writer = run_writer(tmp_path / "run")
    (writer.folder / "config.yaml").write_text("a: [1")
    with pytest.raises(M2MKDError, match=r"config.yaml' is damaged"):
        read_run(writer.folder)
    (writer.folder / "config.yaml").write_text("- 1")
    with pytest.raises(M2MKDError, match=r"config.yaml' should hold one YAML mapping, found a list"):
        read_run(writer.folder)
    (writer.folder / "config.yaml").unlink()
    (writer.folder / "run.json").write_text("{")
    with pytest.raises(M2MKDError, match=r"run.json' is damaged"):
        read_run(writer.folder)


def lines_of(steps: range) -> list[dict]:
    return [{"step": step, "loss": 1.0 / (1 + step), "seconds": float(step), "flops": 10.0 * step} for step in steps]


def write(path: Path, lines: list[dict]) -> bytes:
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(content)
    return content


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_cut_anywhere_keeps_its_whole_lines_and_counts_the_torn_one(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = lines_of(range(12))
    content = write(path, lines)
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    training, evaluations, corrupt = read_metrics(path)
    whole = content[:cut].count(b"\n")
    rest = content[:cut].rsplit(b"\n", 1)[-1]
    complete = rest.endswith(b"}")  # only the line's end is missing: the object is whole
    assert training == lines[: whole + complete]
    assert evaluations == []
    assert corrupt == int(bool(rest) and not complete)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode)), resumed=st.booleans())
def test_no_garbage_at_the_end_loses_earlier_lines(tmp_path: Path, garbage: bytes, resumed: bool) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = lines_of(range(5))
    content = write(path, lines)
    tail = b"\n" + json.dumps({"step": 5, "loss": 0.1}).encode() + b"\n" if resumed else b""
    path.write_bytes(content + garbage + tail)
    training, _, corrupt = read_metrics(path)
    assert training == lines + ([{"step": 5, "loss": 0.1}] if resumed else [])
    assert corrupt == sum(bool(part.strip()) for part in garbage.split(b"\n"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=5))
def test_resumed_stretches_replace_what_was_done_twice(tmp_path: Path, stops: list[tuple[int, int]]) -> None:
    """Whatever the resumes, steps rise strictly and each line is the last that was written for its step."""
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": step, "loss": float(attempt)}
        for attempt, (start, length) in enumerate(stops)
        for step in range(start, start + length)
    ]
    write(path, lines)
    training, _, corrupt = read_metrics(path)
    steps = [line["step"] for line in training]
    assert corrupt == 0
    assert steps == sorted(set(steps))
    for line in training:
        assert line == [other for other in lines if other["step"] == line["step"]][-1]
    if lines:
        assert training[-1] == lines[-1]


def test_lines_that_are_no_objects_with_a_step_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('3\n{"loss": 1}\n{"step": "x", "loss": 1}\n{"step": true, "loss": 1}\n\n{"step": 1, "loss": NaN}\n')
    training, _, corrupt = read_metrics(path)
    assert corrupt == 4
    assert [line["step"] for line in training] == [1]


def test_an_unfinished_step_has_spent_what_its_last_line_says(tmp_path: Path, run_writer: type) -> None:
    writer = run_writer(tmp_path / "run")
    writer.pair("task", 0, steps=100, finished=False)
    step = read_run(writer.folder).steps["task/pair0"]
    assert not step.finished
    assert step.training_steps == 100
    assert step.spent("seconds") == pytest.approx(12.0)
    assert step.spent("flops") == pytest.approx(1.0e12)
