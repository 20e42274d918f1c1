"""Whole runs: every step, several at a time, and every mistake before long work; what befalls them: test_faults.py."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import PHASE, outcome, tiny

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.modules.state import save_module
from m2mkd_fast.pipeline.config import make_config
from m2mkd_fast.pipeline.plan import closure, plan
from m2mkd_fast.pipeline.run import run
from m2mkd_fast.pipeline.steps import check_hybrids
from m2mkd_fast.pipeline.workbench import Workbench

PUBLISHED = {"recipe": "published", "meta": {"max_hybrid_drop": 100.0, "train": PHASE}}


def config_of(folder: Path, *layers, **changes):
    return make_config([tiny(output=str(folder), **changes), *layers])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return run(config_of(tmp_path_factory.mktemp("undisturbed")))


def test_every_step_leaves_weights_and_a_result(undisturbed):
    config = config_of(undisturbed)
    names = [step.name for step in plan(config, 3)]
    assert sorted(outcome(undisturbed)) == sorted(names)
    for name in names:
        assert (undisturbed / "steps" / name / "weights.safetensors").exists() == (name != "hybrids")
        assert not (undisturbed / "steps" / name / "checkpoints").exists()
    facts = json.loads((undisturbed / "run.json").read_text())
    assert torch.__version__.startswith(facts["versions"]["torch"])
    assert facts["data"]["splits"].keys() >= {"train", "test"}
    end = Workbench(config, undisturbed).result("m2mkd/e2e")
    assert {"test_accuracy", *(f"cold_{s}_test_accuracy" for s in ("kept", "folded", "dropped"))} <= end[
        "metrics"
    ].keys()
    assert set(Workbench(config, undisturbed).result("m2mkd/pair0")["gradient_share"]) == {
        "task",
        "distillation",
        "feature",
    }


def test_two_jobs_give_the_same_as_one(undisturbed, tmp_path):
    run(config_of(tmp_path), jobs=2)
    assert outcome(tmp_path) == outcome(undisturbed)


def test_a_finished_run_is_not_done_again(undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("result.json")}
    run(config_of(undisturbed))
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("result.json")}


FITTED = {"student": {"stitch_init": "least_squares", "stitch_batches": 3, "stitches": "folded"}}


@pytest.fixture(scope="module")
def fitted_and_folded(tmp_path_factory) -> Path:
    config = config_of(tmp_path_factory.mktemp("fitted"), FITTED, arms=["m2mkd", "task"])
    return run(config, only=lambda step: step.name in ("m2mkd/e2e", "task/pair1"))


def test_stitches_are_fitted_before_a_pair_and_folded_after_it(fitted_and_folded):
    bench = Workbench(config_of(fitted_and_folded, FITTED, arms=["m2mkd", "task"]), fitted_and_folded)
    fits = [bench.result(f"m2mkd/pair{slot}")["stitch_fit"] for slot in range(3)]
    assert [sorted(fit) for fit in fits] == [["post"], ["post"], []]
    assert all(0 < explained <= 1 for fit in fits for explained in fit.values())
    # The arm that learns from labels alone starts from nothing of the teacher's.
    assert bench.result("task/pair1")["stitch_fit"] == {}
    end = bench.result("m2mkd/e2e")["metrics"]
    assert end["cold_folded_test_accuracy"] == pytest.approx(end["cold_kept_test_accuracy"], abs=1.0)
    assert end["cold_test_accuracy"] == end["cold_folded_test_accuracy"]
    model = bench.step_model("m2mkd/e2e")
    assert any(name.endswith("post_stitch.inner.weight") for name in model.state_dict())


def test_the_published_recipe_incubates_the_teacher(tmp_path):
    run(config_of(tmp_path, PUBLISHED, arms=["m2mkd"]))
    done = outcome(tmp_path)
    assert {"meta", "mt0", "mt1", "mt2", "ft", "hybrids", "m2mkd/pair0", "m2mkd/e2e"} == done.keys() - {
        "m2mkd/pair1",
        "m2mkd/pair2",
    }
    result = json.loads((tmp_path / "steps/m2mkd/pair0/result.json").read_text())
    assert set(result["terms"]) == {"task", "distillation"}


def test_a_circuit_is_taught_and_assembled(tmp_path):
    config = config_of(
        tmp_path,
        arms=["m2mkd", "scratch"],
        student__model="nac_micro.ring",
        student__options={},
        teacher__parts=4,
        teacher__options__depth=4,
    )
    run(config)
    end = Workbench(config, tmp_path).result("m2mkd/e2e")
    assert end["metrics"].keys() >= {"cold_kept_test_accuracy", "cold_dropped_test_accuracy", "test_accuracy"}


def test_a_pretrained_teacher_is_not_trained(tmp_path):
    config = config_of(tmp_path / "run", arms=["distill"])
    bench = Workbench(config, tmp_path)
    torch.manual_seed(1)
    save_file(dict(bench.teacher()[0].state_dict()), tmp_path / "plain.safetensors")
    save_module(tmp_path / "ours.safetensors", bench.teacher()[0], {})
    for name in ("plain", "ours"):
        folder = tmp_path / name
        run(config_of(folder, arms=["distill"], teacher__weights=str(tmp_path / f"{name}.safetensors")))
        result = Workbench(config, folder).result("teacher")
        assert result["steps"] == 0 and result["metrics"]["test_accuracy"] >= 0


def test_hybrids_far_below_the_teacher_stop_the_run(tmp_path):
    result = {"metrics": {"hybrid_accuracy": [98.0, 19.0], "teacher_accuracy": 99.0}}
    check_hybrids(result, 80.0)
    with pytest.raises(M2MKDError, match=r"reaches 98.0, 19.0 % .* the teacher 99.0 %.*meta.train.steps"):
        check_hybrids(result, 20.0)


def test_the_gate_on_hybrids_also_stops_a_second_start(undisturbed, tmp_path):
    config = config_of(tmp_path, arms=["m2mkd"], meta__max_hybrid_drop=-100.0)
    for _ in range(2):
        with pytest.raises(M2MKDError, match="do not speak the same language"):
            run(config)
    assert not list(tmp_path.glob("steps/m2mkd/pair*/result.json"))


def test_only_wanted_steps_and_what_they_need():
    steps = plan(make_config([tiny()]), 3)
    names = [step.name for step in closure(steps, [step for step in steps if step.name == "m2mkd/pair1"])]
    assert names == ["teacher", "meta", "hybrids", "m2mkd/pair1"]
    assert [step.name for step in closure(steps, [step for step in steps if step.arm == "scratch"])] == ["scratch/e2e"]


def test_asking_for_no_step_is_an_error(tmp_path):
    with pytest.raises(M2MKDError, match="none of this configuration's steps was asked for; it has .*m2mkd/pair2"):
        run(config_of(tmp_path), only=lambda step: step.slot == 9)
    assert not (tmp_path / "steps").exists()


def test_a_teacher_of_one_module_is_one_pair(tmp_path):
    run(config_of(tmp_path, arms=["m2mkd"], teacher__parts=1, student__parts=1))
    assert set(outcome(tmp_path)) == {"teacher", "meta", "hybrids", "m2mkd/pair0", "m2mkd/e2e"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher__model": "vit_mcro"}, "unknown model 'vit_mcro'; did you mean .*'vit_micro'"),
        ({"student__model": "vmoe_micr.m2mkd"}, "did you mean .*'vmoe_micro.m2mkd'"),
        ({"data__spec": "digit"}, "did you mean 'digits'"),
        ({"data__spec": "folder:/nowhere/at/all"}, "/nowhere/at/all"),
        ({"teacher__parts": 9}, "cannot cut 3 blocks into 9 modules"),
        ({"student__parts": 2}, "2 student modules .* do not fit a meta model with 2 cuts"),
        ({"teacher__options__num_classes": 7}, "the teacher has 7 classes, 'digits' has 10"),
        ({"student__options__num_classes": 7}, "7.*10|10.*7"),
        ({"teacher__weights": "/nowhere/teacher.safetensors"}, "there is no file '/nowhere/teacher.safetensors'"),
        ({"data__augmentation": "afine"}, "did you mean .*'affine'"),
        ({"teacher__train__optimizer": "adamv"}, "unknown optimizer 'adamv'; did you mean .*'adamw'"),
    ],
)
def test_mistakes_are_found_before_any_work(tmp_path, changes, message):
    started = time.monotonic()
    with pytest.raises(M2MKDError, match=message):
        run(config_of(tmp_path / "run", **changes))
    assert time.monotonic() - started < 20
    assert not (tmp_path / "run" / "steps").exists()


def test_least_squares_without_pairs_of_positions_is_found_before_any_work(tmp_path):
    changes = {"student__model": "nac_micro.ring", "student__options": {}, "student__tokens": 1}
    changes |= {"teacher__parts": 4, "teacher__options__depth": 4, "student__stitch_init": "least_squares"}
    with pytest.raises(M2MKDError, match=r"post-stitch of module 0 reads \[1\] positions where \[17\] are wanted"):
        run(config_of(tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "steps").exists()


def test_another_configuration_does_not_touch_the_folder(undisturbed):
    before = outcome(undisturbed)
    with pytest.raises(M2MKDError, match=r"another configuration: pair.alpha \(there 0.5, now 0.25\).*output=FOLDER"):
        run(config_of(undisturbed, pair__alpha=0.25))
    assert outcome(undisturbed) == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(M2MKDError, match="cannot write .*file/run"):
        run(config_of(tmp_path / "file" / "run"))


@pytest.fixture
def copied(undisturbed, tmp_path) -> Path:

    return Path(shutil.copytree(undisturbed, tmp_path / "copy"))


def test_a_module_from_another_teacher_is_refused(copied):
    result_path = copied / "steps/teacher/result.json"
    result = json.loads(result_path.read_text()) | {"weights_hash": "0" * 64}
    result_path.write_text(json.dumps(result))
    with pytest.raises(M2MKDError, match="was made from another teacher than the one that is there now"):
        run(config_of(copied))


def test_other_images_than_the_run_was_begun_with_are_refused(copied):
    facts = json.loads((copied / "run.json").read_text())
    facts["data"]["content_hash"] = "0" * 64
    (copied / "run.json").write_text(json.dumps(facts))
    with pytest.raises(M2MKDError, match="are not those that .* was begun with"):
        run(config_of(copied))


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_damaged_weights_are_named_and_nothing_is_lost(copied, damage):
    path = copied / "steps/m2mkd/pair1/weights.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        save_file({"x": torch.zeros(2)}, path)
    (copied / "steps/m2mkd/e2e/result.json").unlink()
    before = outcome(copied)
    with pytest.raises(M2MKDError, match="m2mkd/e2e: .*pair1/weights.safetensors"):
        run(config_of(copied))
    assert outcome(copied) == before


def test_a_damaged_result_is_named(copied):
    (copied / "steps/meta/result.json").write_text('{"step": ')
    with pytest.raises(M2MKDError, match=r"steps/meta/result.json is damaged"):
        run(config_of(copied))
