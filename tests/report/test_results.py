from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.report import collect_results, read_run
from m2mkd_fast.report.results import spread
from m2mkd_fast.report.style import separate_labels

ARMS = ["scratch", "distill", "task", "m2mkd"]


def results_of(*folders: Path) -> dict[str, Any]:
    return collect_results([read_run(folder) for folder in folders])


def test_costs_are_those_computed_by_hand(complete_run: Path) -> None:
    cost = results_of(complete_run)["cost"]["runs"][0]
    # meta 3 TFLOP, 30 s; pairs (1 + 1.1 + 1.2 + 1.3) x (1 TFLOP, 12 s); 400 end-to-end steps of 0.02 TFLOP, 0.17 s.
    for arm in ("task", "m2mkd"):
        part = cost["arms"][arm]
        assert part["phases"]["PT"] == pytest.approx({"flops": 3.0e12, "seconds": 30.0})
        assert part["phases"]["m2mKD"] == pytest.approx({"flops": 4.6e12, "seconds": 55.2})
        assert part["preparation"] == pytest.approx({"flops": 7.6e12, "seconds": 85.2})
        assert part["preparation_in_parallel"] == pytest.approx({"flops": 4.3e12, "seconds": 45.6})
        assert part["total"] == pytest.approx({"flops": 15.6e12, "seconds": 153.2})
        assert part["training_steps"] == {"total": 600 + 4 * 200 + 400, "end_to_end": 400}
        assert part["curve"][0] == pytest.approx({"step": 0, "flops": 7.6e12, "seconds": 85.2})
        assert part["curve"][-1] == pytest.approx({"step": 400, "flops": 15.6e12, "seconds": 153.2})
        assert part["complete"]
    scratch = cost["arms"]["scratch"]
    assert scratch["preparation"] == {"flops": 0.0, "seconds": 0.0}
    assert scratch["total"] == pytest.approx({"flops": 20.0e12, "seconds": 170.0})
    assert cost["teacher"] == {"flops": 2.2e13, "seconds": 150.0}


def test_teacher_modules_made_by_incubation_are_charged_to_m2mkd_alone(tmp_path: Path, run_writer: type) -> None:
    writer = run_writer(tmp_path / "run").everything()
    for slot, seconds in enumerate((10.0, 40.0)):
        writer.step(f"mt{slot}", [], phase="MT", slot=slot, steps=5, seconds=seconds, flops=1e12, metrics={})
    writer.step("ft", [], phase="FT", steps=5, seconds=7.0, flops=2e12, metrics={"test_accuracy": 92.5})
    results = results_of(writer.folder)
    arms = results["cost"]["runs"][0]["arms"]
    assert arms["m2mkd"]["preparation"] == pytest.approx({"flops": 11.6e12, "seconds": 142.2})
    assert arms["m2mkd"]["preparation_in_parallel"]["seconds"] == pytest.approx(45.6 + 40.0 + 7.0)
    assert arms["task"]["preparation"] == pytest.approx({"flops": 7.6e12, "seconds": 85.2})
    assert results["accuracy"]["teacher"]["test_accuracy"]["mean"] == 92.5  # the fine-tuned one gives the modules
    assert results["accuracy"]["runs"][0]["hybrids"][1]["difference"] == pytest.approx(81.0 - 92.5)


def test_pairs_that_wait_for_each_other_in_rounds_have_a_longer_critical_path(tmp_path: Path, run_writer: type) -> None:
    writer = run_writer(tmp_path / "run", slots=2).everything()
    alone = results_of(writer.folder)["cost"]["runs"][0]["arms"]
    # Of 12.0 and 13.2 s: 6 and 2 in one round, 1 and 7 in the next, so 5 and 4.2 are left; the longest add up to 18.
    for index, round_seconds in enumerate([(6.0, 2.0), (1.0, 7.0)]):
        for slot, seconds in enumerate(round_seconds):
            name = f"m2mkd/round{index}/pair{slot}"
            writer.step(name, [], phase="round", slot=slot, steps=5, seconds=seconds, flops=0.0, metrics={})
    arms = results_of(writer.folder)["cost"]["runs"][0]["arms"]
    assert arms["m2mkd"]["preparation_in_parallel"]["seconds"] == pytest.approx(30.0 + 18.0)
    assert arms["task"] == alone["task"]
    # A pair's result is of the whole pair: nothing is charged twice.
    assert arms["m2mkd"]["total"] == alone["m2mkd"]["total"]
    assert arms["m2mkd"]["training_steps"] == alone["m2mkd"]["training_steps"]
    run = read_run(writer.folder)
    assert [[step.slot for step in steps] for steps in run.rounds("m2mkd")] == [[0, 1], [0, 1]]


def test_accuracies_and_pairs_are_those_written(complete_run: Path) -> None:
    run = read_run(complete_run)
    accuracy = results_of(complete_run)["accuracy"]
    part = accuracy["arms"]["m2mkd"]
    assert part["cold_kept_test_accuracy"]["mean"] == 63.8
    assert part["cold_folded_test_accuracy"]["mean"] == pytest.approx(63.7)
    assert part["cold_dropped_test_accuracy"]["mean"] == pytest.approx(38.8)
    assert part["final_test_accuracy"]["mean"] == run.steps["m2mkd/e2e"].result["metrics"]["test_accuracy"]
    assert [point["step"] for point in part["curve"]] == list(range(0, 401, 25))
    pair = accuracy["runs"][0]["pairs"]["m2mkd"][3]
    last = run.steps["m2mkd/pair3"].training[-20:]  # a tenth of 200 lines
    assert pair["loss"] == pytest.approx(sum(line["loss"] for line in last) / 20)
    assert pair["terms"]["feature"] == pytest.approx(sum(line["terms"]["feature"] for line in last) / 20)
    assert pair["gradient_share"] == pytest.approx({"task": 0.6, "distillation": 0.3, "feature": 0.1})
    assert pair["test_accuracy"] == 73.0
    teacher = accuracy["teacher"]["test_accuracy"]["mean"]
    assert [row["difference"] for row in accuracy["runs"][0]["hybrids"]] == pytest.approx(
        [80 - teacher, 81 - teacher, 82 - teacher, 83 - teacher]
    )


def test_a_repeated_run_on_a_slower_machine_has_equal_accuracy(tmp_path: Path, run_writer: type) -> None:
    first = run_writer(tmp_path / "first").everything().folder
    second = run_writer(tmp_path / "second").everything().folder
    for path in second.rglob("metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        slower = [{**line, "seconds": 3 * line.get("seconds", 0.0), "images_per_second": 1.0} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in slower))
    for path in second.rglob("result.json"):
        result = json.loads(path.read_text())
        path.write_text(json.dumps({**result, "seconds": 3 * result["seconds"]}))
    one, two = results_of(first), results_of(second)
    assert one["accuracy"] == two["accuracy"]
    assert one["cost"] != two["cost"]
    assert "seconds" not in json.dumps(one["accuracy"])


def test_keys_are_the_same_for_an_empty_a_complete_and_several_runs(
    tmp_path: Path, run_writer: type, complete_run: Path
) -> None:
    empty = results_of(run_writer(tmp_path / "empty").folder)
    complete = results_of(complete_run)
    several = results_of(complete_run, run_writer(tmp_path / "other", seed=1).everything().folder)
    for results in (empty, several):
        assert results.keys() == complete.keys()
        for part in ("accuracy", "cost"):
            assert results[part].keys() == complete[part].keys()
            assert list(results[part]["arms"]) == ARMS
            assert results[part]["runs"][0].keys() == complete[part]["runs"][0].keys()
            for arm in ARMS:
                assert results[part]["arms"][arm].keys() == complete[part]["arms"][arm].keys()
    assert empty["accuracy"]["arms"]["m2mkd"]["final_test_accuracy"] is None
    assert empty["cost"]["arms"]["m2mkd"]["total"] == {"flops": None, "seconds": None}


def test_several_seeds_give_mean_and_range(tmp_path: Path, run_writer: type) -> None:
    folders = [run_writer(tmp_path / f"seed{seed}", seed=seed).everything().folder for seed in range(3)]
    results = results_of(*folders)
    finals = [read_run(f).steps["distill/e2e"].result["metrics"]["test_accuracy"] for f in folders]
    statistic = results["accuracy"]["arms"]["distill"]["final_test_accuracy"]
    assert statistic["values"] == finals
    assert statistic["mean"] == pytest.approx(sum(finals) / 3)
    assert (statistic["min"], statistic["max"]) == (min(finals), max(finals))
    assert [run["seed"] for run in results["runs"]] == [0, 1, 2]
    last = results["accuracy"]["arms"]["distill"]["curve"][-1]
    assert (last["step"], last["min"], last["max"]) == (900, min(finals), max(finals))
    assert not any(note.startswith("This is one run") for note in results["notes"])


def test_means_over_runs_use_only_steps_that_all_runs_evaluated(tmp_path: Path, run_writer: type) -> None:
    full = run_writer(tmp_path / "full")
    full.e2e("scratch")
    half = run_writer(tmp_path / "half", seed=1)
    half.e2e("scratch", finished=False)
    results = results_of(full.folder, half.folder)
    steps = [point["step"] for point in results["accuracy"]["arms"]["scratch"]["curve"]]
    assert steps[0] == 50
    assert steps[-1] == read_run(half.folder).steps["scratch/e2e"].evaluations[-1]["step"] < 1000
    assert [point["step"] for point in results["cost"]["arms"]["scratch"]["curve"]] == steps
    assert results["accuracy"]["arms"]["scratch"]["final_test_accuracy"]["values"][1] is None


def test_different_configurations_are_not_averaged(tmp_path: Path, run_writer: type, complete_run: Path) -> None:
    other = run_writer(tmp_path / "other", seed=1).everything().folder
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("alpha: 0.5", "alpha: 0.9"))
    with pytest.raises(M2MKDError, match=r"different configurations: pairs.alpha \(0.5 and 0.9\)"):
        results_of(complete_run, other)
    with pytest.raises(M2MKDError, match="no run folder given"):
        collect_results([])


def test_missing_and_unfinished_steps_are_named(tmp_path: Path, run_writer: type) -> None:
    writer = run_writer(tmp_path / "run")
    writer.teacher()
    writer.meta()
    writer.pair("m2mkd", 0)
    writer.pair("m2mkd", 1, steps=30, finished=False)
    writer.e2e("scratch", finished=False)
    results = results_of(writer.folder)
    missing = results["runs"][0]["missing"]
    assert "step m2mkd/pair1 is unfinished (last line at step 30)" in missing
    assert "step scratch/e2e is unfinished (last line at step 525)" in missing
    for name in ("hybrids", "task/pair0", "task/pair1", "task/e2e", "m2mkd/e2e", "distill/e2e"):
        assert f"step {name} was not run" in missing
    assert not any("teacher" in line or "meta" in line for line in missing)
    assert results["cost"]["runs"][0]["arms"]["task"] is None
    assert results["cost"]["runs"][0]["arms"]["m2mkd"]["total"]["seconds"] == pytest.approx(30.0 + 12.0 + 13.2)
    assert "Arm scratch has steps missing or unfinished, so its cost is a lower bound." in results["notes"]


def test_an_arm_whose_pairs_are_not_all_there_is_incomplete(tmp_path: Path, run_writer: type) -> None:
    writer = run_writer(tmp_path / "run")
    writer.meta()
    writer.hybrids()
    for slot in range(3):  # of four
        writer.pair("m2mkd", slot)
    writer.e2e("m2mkd")
    results = results_of(writer.folder)
    assert not results["cost"]["runs"][0]["arms"]["m2mkd"]["complete"]
    assert "Arm m2mkd has steps missing or unfinished, so its cost is a lower bound." in results["notes"]


def test_notes_follow_from_the_numbers(tmp_path: Path, run_writer: type) -> None:
    writer = run_writer(tmp_path / "run")
    metrics = {"test_accuracy": 91.0}
    writer.step("teacher", [], phase="teacher", steps=1, seconds=1.0, flops=1e12, metrics=metrics)
    curves = {"scratch": [(100, 40.0), (200, 80.3)], "distill": [(100, 60.0), (200, 90.2)]}
    for arm, points in curves.items():
        lines = [{"step": s, "test_accuracy": a, "flops": 1e12 * s, "seconds": 0.5 * s} for s, a in points]
        metrics = {"test_accuracy": points[-1][1]}
        writer.step(f"{arm}/e2e", lines, phase="E2E", arm=arm, steps=200, flops=2e14, seconds=100.0, metrics=metrics)
    lines = [{"step": 10, "test_accuracy": 85.0, "flops": 1e13, "seconds": 80.0}]
    metrics = {"test_accuracy": 85.0}
    writer.step("m2mkd/e2e", lines, phase="E2E", arm="m2mkd", steps=10, flops=1e13, seconds=80.0, metrics=metrics)
    notes = results_of(writer.folder)["notes"]
    assert notes[:5] == [
        "In compute, m2mkd was the first arm at 80 % test accuracy: m2mkd after 10.0 TFLOP, scratch after 200 TFLOP "
        "and distill after 200 TFLOP.",
        "In time, m2mkd was the first arm at 80 % test accuracy: m2mkd after 80.0 s, scratch after 100 s and distill "
        "after 100 s.",
        "The teacher's accuracy minus 1 point (90.0 %) was reached by distill after 200 TFLOP and 100 s.",
        "The teacher's accuracy minus 1 point (90.0 %) was not reached by scratch (best 80.3 %) and m2mkd "
        "(best 85.0 %).",
        "Final test accuracy of m2mkd (85.0 %) is 4.7 points above scratch and 5.2 points below distill.",
    ]


def test_only_what_the_result_holds_closes_the_curve(tmp_path: Path, run_writer: type) -> None:
    writer = run_writer(tmp_path / "run")
    metrics = {"test_accuracy": 70.0, "cold_test_accuracy": 20.0, "ood_accuracy": 50.0}
    lines = [{"step": 50, "test_accuracy": 60.0, "flops": 5.0, "seconds": 1.0}]
    plan = {"stitches": "dropped"}
    writer.step("m2mkd/e2e", lines, phase="E2E", steps=80, flops=8.0, seconds=2.0, metrics=metrics, plan=plan)
    results = results_of(writer.folder)
    part = results["accuracy"]["runs"][0]["arms"]["m2mkd"]
    assert [(p["step"], p["test_accuracy"]) for p in part["curve"]] == [(0, 20.0), (50, 60.0), (80, 70.0)]
    assert part["curve"][-1]["ood_accuracy"] == 50.0
    assert part["cold_dropped_test_accuracy"] == 20.0
    assert part["cold_kept_test_accuracy"] is None
    spent = [point["flops"] for point in results["cost"]["runs"][0]["arms"]["m2mkd"]["curve"]]
    assert spent == [0.0, 5.0, 8.0]


def test_a_diverged_pair_has_no_final_loss(tmp_path: Path, run_writer: type) -> None:
    writer = run_writer(tmp_path / "run")
    lines = [{"step": s, "loss": float("nan") if s == 20 else 1.0, "terms": {"task": 1.0}} for s in range(1, 21)]
    writer.step("m2mkd/pair0", lines, phase="m2mKD", steps=20, flops=1.0, seconds=1.0, metrics={})
    pair = results_of(writer.folder)["accuracy"]["runs"][0]["pairs"]["m2mkd"][0]
    assert pair["loss"] is None
    assert pair["terms"] == {"task": 1.0}


def test_spread() -> None:
    assert spread([None, None]) is None
    assert spread([1.0, None, 4.0]) == {"mean": 2.5, "min": 1.0, "max": 4.0, "values": [1.0, None, 4.0]}
    assert spread([0.1, 0.1, 0.1])["mean"] == 0.1  # equal runs have exactly their value as mean


def test_separate_labels_keeps_order_and_distance() -> None:
    assert separate_labels([10.0, 50.0], 5.0) == [10.0, 50.0]
    crowded = separate_labels([82.0, 81.0, 30.0, 81.5], 4.0)
    assert crowded == pytest.approx([85.5, 77.5, 30.0, 81.5])
