"""Whole runs of configurations drawn at random: each comes to its end, or says before any training why it cannot."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_run import PHASE, tiny

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline.config import ARMS, make_config
from m2mkd_fast.pipeline.run import run

FUZZ_EXAMPLES = int(os.environ.get("M2MKD_FUZZ_EXAMPLES", "8"))

TRAINING = st.fixed_dictionaries(
    {
        "steps": st.integers(0, 3),
        "batch_size": st.sampled_from([4, 8, 9]),
        "optimizer": st.sampled_from(["adamw", "sgd", "lion"]),
        "accumulate": st.sampled_from([1, 2, 3]),
        "mixup": st.sampled_from([0.0, 0.8]),
        "cutmix": st.sampled_from([0.0, 1.0]),
        "label_smoothing": st.sampled_from([0.0, 0.1]),
        "clip_grad": st.sampled_from([0.0, 1.0]),
        "ema_decay": st.sampled_from([0.0, 0.9]),
        "layer_decay": st.sampled_from([1.0, 0.8]),
        "checkpoint_activations": st.booleans(),
        "evaluate_every": st.integers(1, 3),
        "checkpoint_every": st.integers(1, 3),
    }
)
PAIR = {
    "alpha": st.sampled_from([0.0, 0.5, 1.0]),
    "kind": st.sampled_from(["soft", "hard"]),
    "kd_reduction": st.sampled_from(["batchmean", "reference"]),
    "feature_weight": st.sampled_from([0.0, 3.0]),
    "prefix": st.sampled_from(["teacher", "meta"]),
    "cache": st.booleans(),
    "cache_batches": st.integers(0, 2),
    "budget": st.fixed_dictionaries({"kind": st.sampled_from(["equal", "bandit"])}),
    "train": TRAINING,
}
STUDENT = {
    "stitches": st.sampled_from(["kept", "folded", "dropped"]),
    "stitch_init": st.sampled_from(["default", "least_squares"]),
    "stitch_batches": st.integers(1, 2),
}
DATA = {
    "repeats": st.sampled_from([1, 3]),
    "augmentation": st.sampled_from(["none", "affine", {"name": "crop_flip", "flip": 1.0}]),
}
CHANGES = st.fixed_dictionaries(
    {
        "recipe": st.sampled_from(["composable", "published"]),
        "arms": st.lists(st.sampled_from(ARMS), min_size=1, max_size=2, unique=True),
        "data": st.fixed_dictionaries(DATA),
        "student": st.fixed_dictionaries(STUDENT),
        "pair": st.fixed_dictionaries(PAIR),
        "e2e": TRAINING,
    }
)


@pytest.mark.slow
@pytest.mark.timeout(0)
@settings(max_examples=FUZZ_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(CHANGES, st.integers(1, 3))
def test_fuzz_runs_end_or_say_why_not(changes: dict[str, Any], parts: int):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        # A recipe's own phases are short, too.
        base = tiny(output=str(folder), teacher__parts=parts, student__parts=parts, baseline__train=PHASE)
        try:
            config = make_config([base, changes])
            run(config)
        except M2MKDError as error:
            assert not (folder / "steps").exists(), f"it was known only after some training: {error}"
            return
        results = [json.loads(path.read_text()) for path in folder.glob("steps/**/result.json")]
        accuracies = [
            value
            for result in results
            for name, value in result.get("metrics", {}).items()
            if name.endswith("test_accuracy")
        ]
        assert accuracies and all(math.isfinite(value) and 0 <= value <= 100 for value in accuracies)
        assert {result["step"].split("/")[0] for result in results if result["arm"]} == set(config.arms)
        assert not list(folder.rglob("*.partial"))
        written = {path: path.stat().st_mtime_ns for path in folder.rglob("weights.safetensors")}
        run(config)
        assert written == {path: path.stat().st_mtime_ns for path in folder.rglob("weights.safetensors")}
