"""The command as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny_run import tiny

from m2mkd_fast.cli import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    """A configuration and the run folder that ``m2mkd run`` made of it, in a process of its own."""
    folder = tmp_path_factory.mktemp("cli")
    config = write(folder, output=str(folder / "run"))
    command = [sys.executable, "-m", "m2mkd_fast", "run", str(config), "--jobs", "2", "pair.train.steps=3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "m2mkd/pair1: starts, 3 steps" in done.stderr
    assert "report:" in done.stdout and "scratch" in done.stdout
    return config, folder / "run"


def write(folder: Path, **changes) -> Path:
    path = folder / "config.yaml"
    OmegaConf.save(OmegaConf.create(tiny(**changes)), path)
    return path


def test_run_leaves_a_report_with_every_arm(finished):
    _, run = finished
    text = (run / "report.md").read_text()
    for arm in ("scratch", "distill", "task", "m2mkd"):
        assert arm in text
    command = json.loads((run / "run.json").read_text())["command"]
    assert command.startswith("m2mkd run") and command.endswith("--jobs 2 pair.train.steps=3")
    results = json.loads((run / "results.json").read_text())
    assert set(results["accuracy"]["arms"]) == {"scratch", "distill", "task", "m2mkd"}
    assert results["accuracy"]["arms"]["m2mkd"]["cold_kept_test_accuracy"]["values"]
    for picture in ("accuracy_vs_cost", "pair_losses", "final_accuracy", "expert_load", "cost_per_phase"):
        assert (run / f"{picture}.png").stat().st_size > 5000


@pytest.mark.parametrize("step", ["teacher", "meta", "m2mkd/pair1", "m2mkd/e2e", "task/e2e", "scratch/e2e"])
def test_eval_repeats_what_the_step_reported(finished, capsys, step):
    _, run = finished
    assert main(["eval", str(run), "--step", step]) == 0
    result = json.loads((run / "steps" / step / "result.json").read_text())
    assert f"{step} test accuracy: {result['metrics']['test_accuracy']:.2f} %" in capsys.readouterr().out


def test_split_shows_the_parts(finished, capsys):
    config, _ = finished
    assert main(["split", str(config)]) == 0
    out = capsys.readouterr().out
    assert "bit for bit" in out.replace("\n", " ")
    assert "logits" in out


def test_distill_stops_before_the_end_to_end_step(tmp_path):
    config = write(tmp_path, output=str(tmp_path / "run"))
    assert main(["distill", str(config), "--slot", "1"]) == 0
    done = {path.parent.relative_to(tmp_path / "run/steps").as_posix() for path in tmp_path.rglob("result.json")}
    assert done == {"teacher", "meta", "hybrids", "m2mkd/pair1"}


def test_train_does_one_arm(tmp_path, capsys):
    config = write(tmp_path, output=str(tmp_path / "run"))
    assert main(["train", str(config), "--arm", "scratch"]) == 0
    assert [path.parent.parent.name for path in tmp_path.rglob("result.json")] == ["scratch"]
    assert "scratch" in capsys.readouterr().out


def test_report_on_two_seeds_needs_a_folder(finished, tmp_path, capsys):
    _, run = finished
    assert main(["report", str(run), str(run)]) == 2
    assert "--output FOLDER" in capsys.readouterr().err
    assert main(["report", str(run), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "report.md").exists()


def test_prune_and_report_on_a_circuit(tmp_path, capsys):
    student = {"student": {"model": "nac_micro.ring", "parts": 4, "stitches": "dropped"}, "arms": ["scratch"]}
    config = write(tmp_path, output=str(tmp_path / "run"), **student)
    assert main(["train", str(config), "--arm", "scratch"]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/learned_graph.png").stat().st_size > 5000
    assert "| scratch/e2e | propagators.1 | 16 x 24 |" in (tmp_path / "run/report.md").read_text()
    command = ["prune", str(tmp_path / "run"), "--step", "scratch/e2e", "--rounds", "2"]
    assert main([*command, "--keep", "1.0", "0.5", "4", "--keep-inputs", "6"]) == 0
    points = json.loads((tmp_path / "run/pruning.json").read_text())["points"]
    assert [(point["keep"], point["mediators"], point["inputs"]) for point in points] == [
        (1.0, 16, 6),
        (0.5, 8, 6),
        (4, 4, 6),
    ]
    assert (tmp_path / "run/pruning.png").stat().st_size > 5000
    assert "mediators" in capsys.readouterr().out
    assert main([*command, "--keep", "25"]) == 2
    assert "for 25 % give 0.25" in capsys.readouterr().err
    assert main([*command, "--batch-size", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_info_says_what_runs(capsys):
    assert main(["info"]) == 0
    assert "route" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nowhere.yaml"], "no configuration file 'nowhere.yaml'"),
        (["eval", "/nowhere"], "/nowhere is no run folder"),
        (["report", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line_and_status_2(capsys, words, message):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("m2mkd: error: ") and message in error
    assert "Traceback" not in error


def test_unknown_names_list_the_near_ones(finished, capsys):
    config, run = finished
    assert main(["run", str(config), "pair.alhpa=1"]) == 2
    assert "did you mean 'pair.alpha'" in capsys.readouterr().err
    assert main(["train", str(config), "--arm", "m2mdk"]) == 2
    assert "did you mean 'm2mkd'" in capsys.readouterr().err
    assert main(["eval", str(run), "--step", "m2mkd/e2"]) == 2
    assert "'m2mkd/e2e'" in capsys.readouterr().err


def test_unknown_options_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "config.yaml", "--job", "2", "--slots"])
    assert "unrecognized arguments" in capsys.readouterr().err
