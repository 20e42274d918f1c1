"""Runs whose teacher or student is a timm model of another layout than tokens: every step, killed and started again."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import PHASE, tiny

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.config import make_config
from m2mkd_fast.pipeline.preflight import preflight
from m2mkd_fast.pipeline.run import run
from m2mkd_fast.pipeline.workbench import Workbench

CONVNEXT = {
    "model": "convnext_atto",
    "options": {"depths": [3, 2, 1, 1], "dims": [8, 12, 16, 16], "patch_size": 2, "output_stride": 8},
    "parts": 2,
    "train": PHASE,
}
SWIN = {
    "model": "swin_tiny_patch4_window7_224",
    "options": {"patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4]},
    "parts": 2,
    "train": PHASE,
}
RESNET = {
    "model": "resnet18",
    "options": {"layers": [2, 2, 1, 1], "channels": [8, 12, 16, 16], "output_stride": 8},
    "parts": 4,
    "train": PHASE,
}


def config_of(folder: Path, teacher: dict, **changes):
    return make_config([tiny(output=str(folder), teacher=teacher, **changes)])


def weights(folder: Path) -> dict[str, str]:
    results = [json.loads(path.read_text()) for path in folder.glob("steps/**/result.json")]
    return {result["step"]: json.dumps([result.get("weights_hash"), result["metrics"]]) for result in results}


def test_a_hierarchical_teacher_and_a_mixture_of_experts(tmp_path):
    config = config_of(tmp_path, CONVNEXT, student__parts=2, arms=["m2mkd"])
    run(config)
    end = Workbench(config, tmp_path).result("m2mkd/e2e")
    assert {"test_accuracy", "cold_kept_test_accuracy", "cold_dropped_test_accuracy"} <= end["metrics"].keys()
    assert all(math.isfinite(value) for value in end["terms"].values())


# A process that kills itself in the middle of a phase.
KILLER = """
import os, signal, sys
from m2mkd_fast.pipeline import training
from m2mkd_fast.pipeline.config import load_config
from m2mkd_fast.pipeline.run import run
step = training._Run._step
def lethal(self, t, *arguments):
    if sys.argv[2] in str(self.folder) and t == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, t, *arguments)
training._Run._step = lethal
run(load_config(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_with_batch_normalisation_is_resumed_with_the_same_bits(tmp_path):
    """Teacher and student with batch norms: their statistics are part of the checkpoint, and of what is compared."""
    from omegaconf import OmegaConf

    teacher = {**RESNET, "parts": 2}
    student = {"model": "resnet18", "options": {**RESNET["options"], "channels": [4, 6, 8, 8]}, "parts": 2}
    configs = [config_of(tmp_path / name, teacher, student=student, arms=["m2mkd"]) for name in ("whole", "killed")]
    run(configs[0])
    OmegaConf.save(OmegaConf.create(configs[1].to_dict()), tmp_path / "config.yaml")
    for victim in ("steps/meta", "m2mkd/pair1"):
        process = subprocess.run([sys.executable, "-c", KILLER, str(tmp_path / "config.yaml"), victim])
        assert process.returncode == -signal.SIGKILL
    run(configs[1])
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.parametrize("teacher", [SWIN, CONVNEXT, RESNET], ids=["swin", "convnext", "resnet"])
def test_circuits_fit_teachers_with_maps(tmp_path, teacher):
    student = {"model": "nac_micro.ring"}
    config = config_of(tmp_path, {**teacher, "parts": 4}, student=student, arms=["m2mkd"])
    assert preflight(Workbench(config, tmp_path)) == 4


def test_what_does_not_fit_a_hierarchical_teacher_is_said_before_any_work(tmp_path):
    circuit = {"model": "nac_micro.ring", "tokens": 5}
    with pytest.raises(M2MKDError, match="5 latents of the read-in do not fill channels-first maps of width 8"):
        preflight(Workbench(config_of(tmp_path, RESNET, student=circuit), tmp_path))
    with pytest.raises(M2MKDError, match="2 student modules .* do not fit a meta model with 3 cuts"):
        preflight(Workbench(config_of(tmp_path, RESNET, student__parts=2), tmp_path))
    fixed = {**SWIN, "options": {**SWIN["options"], "img_size": 32}}
    with pytest.raises(M2MKDError, match="does not run on images of shape"):
        preflight(Workbench(config_of(tmp_path, fixed), tmp_path))
