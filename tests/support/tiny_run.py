"""The smallest run that has every step: about three seconds on one core."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

PHASE = {"steps": 4, "batch_size": 16, "evaluate_every": 4, "checkpoint_every": 2}
TINY: dict[str, Any] = {
    "name": "tiny",
    "threads": 1,
    "device": "cpu",
    "data": {"spec": "digits", "options": {"images_per_class": 8}},
    "teacher": {
        "model": "vit_micro",
        "options": {"embed_dim": 16, "depth": 3, "num_heads": 2},
        "parts": 3,
        "train": PHASE,
    },
    "meta": {"max_hybrid_drop": 100.0, "train": PHASE},
    "incubation": {"train": PHASE, "finetune": PHASE},
    "student": {
        "model": "vmoe_micro.m2mkd",
        "options": {"embed_dim": 8, "depth": 3, "num_heads": 2, "num_experts": 3},
        "parts": 3,
    },
    "pair": {"train": PHASE},
    "e2e": PHASE,
    "baseline": {"match_steps": False, "train": PHASE},
}


def tiny(**changes: Any) -> dict[str, Any]:
    """The tiny configuration with some keys, dotted ones as ``a__b``, changed."""
    config = OmegaConf.create(copy.deepcopy(TINY))
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value, merge=False)
    return OmegaConf.to_container(config)


def outcome(folder: Path) -> dict[str, tuple]:
    """Per step everything that must not depend on how the run went: weights, accuracies, losses, work done."""
    results = {}
    for path in sorted(folder.glob("steps/**/result.json")):
        result = json.loads(path.read_text())
        results[result["step"]] = tuple(
            json.dumps(result.get(key)) for key in ("weights_hash", "metrics", "terms", "steps", "images", "flops")
        )
    return results
