from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.report import summary_table, write_frontier, write_report
from m2mkd_fast.report.plot_over_time import plot_expert_load_over_time, plot_graph_density_over_time
from m2mkd_fast.report.run_folder import read_run
from m2mkd_fast.report.units import flop_unit, join_words, significant, time_unit
from m2mkd_fast.report.write import CAPTIONS


def assert_picture(path: Path) -> np.ndarray:
    """Pixels of a picture that is not blank: its ink covers some part of every quarter-high band."""
    pixels = matplotlib.image.imread(path)[..., :3]
    assert pixels.std() > 0.02, f"{path.name} is blank"
    for band in np.array_split(pixels, 4):
        assert band.min() < 0.9
    return pixels


def has_colour(pixels: np.ndarray, colour: str) -> bool:
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return bool((np.abs(pixels - wanted).max(axis=-1) < 0.02).sum() > 50)


@pytest.fixture(scope="module")
def report(watched_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on the watched run, in a folder of its own."""
    return write_report(watched_run, tmp_path_factory.mktemp("report")).parent


def test_every_file_is_written_and_the_run_folder_left_alone(report: Path, watched_run: Path) -> None:
    assert {path.name for path in report.iterdir()} == {"report.md", "results.json", *CAPTIONS}
    assert {path.name for path in watched_run.iterdir()} == {"config.yaml", "run.json", "steps"}


@pytest.mark.parametrize("name", sorted(CAPTIONS))
def test_pictures_are_not_blank(report: Path, name: str) -> None:
    pixels = assert_picture(report / name)
    if name not in ("pair_losses.png", "budget.png"):
        assert has_colour(pixels, "#009E73"), "the distill arm's colour is missing"
    assert has_colour(pixels, "#D55E00"), "the m2mkd arm's colour is missing"
    assert has_colour(pixels, "#0072B2"), "the task arm's colour is missing"


def test_the_report_says_what_the_results_hold(report: Path) -> None:
    text = (report / "report.md").read_text()
    results = json.loads((report / "results.json").read_text())
    final = results["accuracy"]["arms"]["m2mkd"]["final_test_accuracy"]["mean"]
    assert (
        f"| m2mkd | 1,800 (400 end to end) | 15.6 | 153 | 63.8 / 63.7 / 38.8 | {final:.1f} | {final - 30:.1f} |" in text
    )
    assert "| scratch | 1,000 | 20.0 | 170 | - |" in text
    assert "| 0 | 80.0 |" in text
    assert "critical path is: task 114 s instead of 153 s and m2mkd 114 s instead of 153 s" in text
    assert "variance explained by the fitted pre-stitch (%) | variance explained by the fitted post-stitch (%)" in text
    assert " | - | 70.0 | 70.0 |" in text  # slot 0 of m2mkd: no pre-stitch, then the hybrid's accuracy
    assert "has 63.8 % test accuracy with its stitches kept, 63.7 % with them folded and 38.8 % with them" in text
    assert "EPYC 7B13" in text
    assert "`0123abcd`" in text
    assert "| `pairs.alpha` | `0.5` |" in text
    assert "| m2mKD | 464 | 35.0 | 4.00 | 12 |" in text  # eight pairs of 200 steps, slot i left out i
    assert "| teacher | - | - | - | - |" in text  # of before there were such lines
    assert "Nothing: every step of the four arms finished." in text
    for name in CAPTIONS:
        assert f"]({name})" in text
    for note in results["notes"]:
        assert f"- {note}" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(line.count(" | ") >= 1 for line in rows)


def test_the_report_says_what_a_bandit_gave_to_whom(tmp_path: Path, run_writer: type) -> None:
    writer = run_writer(tmp_path / "run", slots=2)
    for slot, steps in enumerate((60, 20)):
        writer.pair("m2mkd", slot, steps=steps)
    text = write_report(writer.folder).read_text()
    assert "| m2mkd | 0 | 60 | 30 15 | 15 | 2.50 | 1.25 | 1.00 | 70.0 |" in text
    assert "| m2mkd | 1 | 20 | 10 5 | 5 | 2.50 | 1.25 | 1.10 | 71.0 |" in text
    assert (
        "Of the 80 steps of m2mkd slot 0 got the most (1.50 times an equal share) and slot 1 the fewest (0.50 times)."
        in text
    )
    assert_picture(writer.folder / "budget.png")
    for path in writer.folder.glob("steps/m2mkd/*/result.json"):
        result = json.loads(path.read_text())
        del result["budget"]
        path.write_text(json.dumps(result))
    assert "## Budget" not in write_report(writer.folder).read_text()
    assert not (writer.folder / "budget.png").exists()


def test_the_report_lands_in_the_run_folder_by_default_and_can_be_written_again(
    tmp_path: Path, run_writer: type
) -> None:
    writer = run_writer(tmp_path / "run")
    writer.e2e("scratch")
    path = write_report(writer.folder)
    assert path == writer.folder / "report.md"
    first = (path.read_text(), (writer.folder / "results.json").read_text())
    assert (writer.folder / "expert_load.png").is_file()
    assert write_report(str(writer.folder)) == path
    assert (path.read_text(), (writer.folder / "results.json").read_text()) == first
    shutil.rmtree(writer.folder / "steps/scratch")
    write_report(writer.folder)
    assert not list(writer.folder.glob("*.png")), "pictures of what is no longer there stayed behind"


def test_an_empty_run_says_that_everything_is_missing(tmp_path: Path, run_writer: type) -> None:
    writer = run_writer(tmp_path / "run")
    (writer.folder / "run.json").unlink()
    (writer.folder / "config.yaml").unlink()
    (writer.folder / "steps").mkdir()
    text = write_report(writer.folder).read_text()
    assert "- config.yaml is missing" in text
    assert "- step m2mkd/e2e was not run" in text
    assert "| m2mkd | not run | - | - | - | - | - |" in text
    assert "No pair was trained." in text
    assert "The hybrids were not evaluated." in text


@pytest.mark.parametrize("left_out", ["teacher", "meta", "hybrids", "task", "m2mkd", "distill", "scratch"])
def test_a_run_without_one_part_still_has_a_report(tmp_path: Path, complete_run: Path, left_out: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(complete_run, folder)
    shutil.rmtree(folder / "steps" / left_out)
    text = write_report(folder).read_text()
    assert f"step {left_out}{'' if left_out in ('teacher', 'meta', 'hybrids') else '/e2e'} was not run" in text
    assert_picture(folder / "accuracy_vs_cost.png")


def test_a_killed_run_has_a_report_that_counts_the_torn_line(tmp_path: Path, complete_run: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(complete_run, folder)
    (folder / "steps/m2mkd/e2e/result.json").unlink()
    with (folder / "steps/m2mkd/e2e/metrics.jsonl").open("a") as file:
        file.write('{"step": 425, "lo')
    text = write_report(folder).read_text()
    assert "Run run: unreadable metrics lines were left out (1 in m2mkd/e2e)." in text
    assert "step m2mkd/e2e is unfinished (last line at step 400)" in text
    assert "| unfinished (" in text
    assert json.loads((folder / "results.json").read_text())["runs"][0]["corrupt_lines"] == {"m2mkd/e2e": 1}


def test_several_runs_share_one_report(tmp_path: Path, run_writer: type) -> None:
    folders = [run_writer(tmp_path / f"seed{seed}", seed=seed).everything().folder for seed in range(2)]
    with pytest.raises(M2MKDError, match="2 runs belongs to none of their folders; name an output folder"):
        write_report(folders)
    path = write_report(folders, tmp_path / "both" / "report")
    text = path.read_text()
    results = json.loads((path.parent / "results.json").read_text())
    statistic = results["accuracy"]["arms"]["scratch"]["final_test_accuracy"]
    assert f"{statistic['mean']:.1f} ({statistic['min']:.1f} to {statistic['max']:.1f})" in text
    assert "| **Seeds** | 0, 1 |" in text
    assert "| seed1 | 3 | 83.0 |" in text
    assert_picture(path.parent / "final_accuracy.png")


def test_load_and_density_over_time_are_drawn_as_far_as_they_are_known(tmp_path: Path, run_writer: type) -> None:
    run = read_run(run_writer(tmp_path / "old").everything().folder)
    assert plot_expert_load_over_time(run) is None and plot_graph_density_over_time(run) is None
    load = [[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [float("nan"), 0.5, 0.5]]
    entries = [{"step": 10 * i, "test_accuracy": 1.0, "expert_load": {"blocks.1": load[i]}} for i in range(3)]
    writer = run_writer(tmp_path / "new")
    writer.step("m2mkd/e2e", [*entries, {"step": 30, "test_accuracy": 1.0, "expert_load": {"blocks.1": "?"}}])
    run = read_run(writer.folder)
    busiest, least = plot_expert_load_over_time(run).axes[0].lines
    assert (list(busiest.get_xdata()), list(busiest.get_ydata())) == ([0, 10], pytest.approx([1.5, 1.2]))
    assert list(least.get_ydata()) == pytest.approx([0.6, 0.6])
    assert plot_graph_density_over_time(run) is None


def test_results_are_json_even_where_numbers_are_not_finite(tmp_path: Path, run_writer: type) -> None:
    writer = run_writer(tmp_path / "run")
    (writer.folder / "config.yaml").write_text("clip: .inf\ncreated: 2025-01-01\n")
    load = {"blocks.1": [float("nan"), 0.5]}
    nan = float("nan")
    writer.step("m2mkd/pair0", [{"step": 1, "loss": nan}], phase="m2mKD", steps=1, flops=nan, seconds=1, metrics={})
    writer.step("m2mkd/e2e", [], phase="E2E", steps=1, flops=1.0, seconds=1, metrics={}, expert_load=load)
    write_report(writer.folder)
    results = json.loads((writer.folder / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["config"] == {"clip": None, "created": "2025-01-01"}
    assert results["accuracy"]["runs"][0]["expert_load"]["m2mkd/e2e"]["blocks.1"] == [None, 0.5]


def test_the_learned_graph_is_shown_with_its_density(tmp_path: Path, run_writer: type) -> None:
    writer = run_writer(tmp_path / "run")
    graph = writer.e2e("m2mkd") / "graph.npz"
    writer.e2e("scratch", load=False)
    text = write_report(writer.folder).read_text()
    row = "| m2mkd/e2e | propagators.0 | 16 x 24 | 25.0 | 100.0 / 75.0 / 100.0 | 6.2 | 50.0 / 100.0 / 100.0 | 0 |"
    assert row in text
    assert "tiles of 16 / 32 / 64 with a link (%)" in text
    assert "| scratch/e2e | propagators.0" not in text
    pixels = assert_picture(writer.folder / "learned_graph.png")
    assert has_colour(pixels, "#D55E00")
    graph.write_bytes(graph.read_bytes()[:100])
    with pytest.raises(M2MKDError, match=r"graph\.npz' is damaged.*delete it to report without the picture"):
        write_report(writer.folder)
    graph.unlink()
    text = write_report(writer.folder).read_text()
    assert row in text and "learned_graph.png" not in text
    assert not (writer.folder / "learned_graph.png").exists()


def test_a_frontier_is_a_picture_and_a_file(tmp_path: Path) -> None:
    points = [
        {"keep": 1.0, "mediators": 16, "accuracy": 90.0, "latency_ms": 4.0, "speedup": 1.0},
        {"keep": 0.5, "mediators": 8, "accuracy": 88.0, "latency_ms": 2.5, "speedup": 1.6},
    ]
    assert write_frontier(tmp_path, points, {"title": "Removed", "step": "m2mkd/e2e"}) == [
        tmp_path / "pruning.json",
        tmp_path / "pruning.png",
    ]
    written = json.loads((tmp_path / "pruning.json").read_text())
    assert written == {"title": "Removed", "step": "m2mkd/e2e", "points": points}
    assert has_colour(assert_picture(tmp_path / "pruning.png"), "#D55E00")


def test_pair_losses_of_ten_slots_fill_two_rows(tmp_path: Path, run_writer: type) -> None:
    writer = run_writer(tmp_path / "run", slots=10)
    for slot in range(10):
        writer.pair("m2mkd", slot, steps=30)
    write_report(writer.folder)
    height, width, _ = assert_picture(writer.folder / "pair_losses.png").shape
    assert width > 2 * height


def test_the_terminal_table_shows_the_arms(complete_run: Path, tmp_path: Path, run_writer: type) -> None:
    def shown(folder: Path) -> str:
        console = Console(file=io.StringIO(), width=100)
        console.print(summary_table(folder))
        return console.file.getvalue()

    text = shown(complete_run)
    rows = [line.split() for line in text.splitlines() if line.strip()]
    assert [row[0] for row in rows[-5:]] == ["teacher", "scratch", "distill", "task", "m2mkd"]
    assert rows[-1][1:6] == ["1,800", "(400", "E2E)", "15.6", "153"]
    assert "63.8 / 63.7 / 38.8" in text
    assert len(text.splitlines()) < 15
    writer = run_writer(tmp_path / "run")
    writer.e2e("scratch", finished=False)
    text = shown(writer.folder)
    assert "unfinished (" in text
    assert "step teacher was not run; step meta was not run; step hybrids was not run; and 6 more" in text


def test_importing_the_report_loads_neither_matplotlib_nor_torch() -> None:
    code = (
        "import sys, m2mkd_fast.report as report; report.summary_table; report.write_report; "
        "sys.exit(sum(name in sys.modules for name in ('matplotlib', 'torch', 'torchvision')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_figures_leave_the_callers_matplotlib_alone(complete_run: Path, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    write_report(complete_run, tmp_path / "report")
    assert dict(matplotlib.rcParams) == before


def test_units() -> None:
    assert flop_unit([None, 0.0]).name == "FLOP"
    assert flop_unit([2e15, 3e12]).text(2.5e15) == "2.50 PFLOP"
    assert time_unit([100.0]).text(100.0) == "100 s"
    assert time_unit([600.0]).text(90.0) == "1.50 min"
    assert time_unit([7 * 3600.0]).name == "h"
    assert [significant(value) for value in (0, 1234.5, 12.345, 0.012345, -3.0)] == [
        "0", "1234", "12.3", "0.0123", "-3.00",
    ]  # fmt: skip
    assert [join_words(list(words)) for words in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]
