"""A small writer of synthetic run folders with realistic curves."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ARMS = ("scratch", "distill", "task", "m2mkd")
META_COST = {"flops": 3.0e12, "seconds": 30.0}
PAIR_FLOPS, PAIR_SECONDS = 1.0e12, 12.0  # of slot i: (1 + i / 10) times these
_SHAPES = {  # cold accuracy, final accuracy, training steps, time constant
    "scratch": (None, 78.4, 1000, 330.0),
    "distill": (None, 83.1, 900, 260.0),
    "task": (41.2, 82.3, 400, 90.0),
    "m2mkd": (63.8, 87.9, 400, 75.0),
}


class RunWriter:
    """Writes a run folder step by step; every number it makes up follows from the seed."""

    def __init__(self, folder: Path, *, seed: int = 0, slots: int = 4) -> None:
        self.folder, self.seed, self.slots = folder, seed, slots
        self.random = random.Random(seed)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(
            f"seed: {seed}\ndata: {{name: glyphs, classes: 10}}\nteacher: {{model: vit_micro, parts: {slots}}}\n"
            "student: {model: vmoe_micro.m2mkd}\npairs: {alpha: 0.5, tau: 1.0, steps: 200, learning_rate: 0.0005}\n"
        )
        info = {
            "created": "2025-11-21T10:00:00Z",
            "commit": "0123abcd",
            "versions": {"torch": "2.11.0", "python": "3.11.9"},
            "machine": {"cpu": "EPYC 7B13", "cores": 2, "gpu": None},
            "command": "m2mkd run micro.yaml",
        }
        (folder / "run.json").write_text(json.dumps(info))

    def step(self, name: str, lines: list[dict[str, Any]], **result: Any) -> Path:
        """A finished step; without keyword arguments an unfinished one."""
        folder = self.folder / "steps" / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if result:
            (folder / "result.json").write_text(json.dumps({"step": name, "images": 0, "made_from": {}, **result}))
        return folder

    def teacher(self, accuracy: float = 89.5) -> None:
        metrics = {"test_accuracy": accuracy + self._noise(), "ood_accuracy": 61.0}
        self.step("teacher", [], phase="teacher", steps=2000, seconds=150.0, flops=2.2e13, metrics=metrics)

    def meta(self) -> None:
        self.step("meta", [], phase="PT", steps=600, **META_COST, metrics={"test_accuracy": 74.0})

    def hybrids(self) -> None:
        accuracies = [80.0 + slot for slot in range(self.slots)]
        self.step(
            "hybrids", [], phase="hybrids", steps=0, seconds=2.0, flops=0.0, metrics={"hybrid_accuracy": accuracies}
        )

    def pair(self, arm: str, slot: int, steps: int = 200, finished: bool = True) -> Path:
        cost = {"flops": PAIR_FLOPS * (1 + slot / 10), "seconds": PAIR_SECONDS * (1 + slot / 10)}
        lines = []
        for step in range(1, steps + 1):
            task = 0.5 + 1.8 * math.exp(-step / 40) + 0.12 * self.random.random() + 0.05 * slot
            line: dict[str, Any] = {"step": step, "learning_rate": 5e-4, "images_per_second": 2000.0}
            line |= {"model_flop_utilisation": 0.25 + 0.1 * (step % 3), "peak_memory_bytes": (1 + slot) << 30}
            line |= {key: value * step / steps for key, value in cost.items()}
            if arm == "task":
                line |= {"loss": task, "terms": {"task": task}}
            else:
                distillation, feature = 0.7 * task, 0.2 * math.exp(-step / 60) + 0.05
                line |= {"loss": 0.5 * task + 0.5 * distillation + feature}
                line |= {"terms": {"task": 0.5 * task, "distillation": 0.5 * distillation, "feature": feature}}
                line |= {"gradient_share": {"task": 0.6, "distillation": 0.3, "feature": 0.1}}
            lines.append(line)
        result = {
            "phase": "m2mKD",
            "arm": arm,
            "slot": slot,
            "steps": steps,
            "images": 32 * steps,
            "skipped": slot,
            **cost,
        }
        if arm == "m2mkd":
            result["stitch_fit"] = {"pre": 0.9, "post": 0.7} if slot else {"post": 0.7}
        shares, losses = (steps // 2, steps // 4, steps - steps // 2 - steps // 4), (2.5, 1.5, 1.25, 1.0 + 0.1 * slot)
        keys = ("steps", "loss_before", "loss_after")
        slices = [dict(zip(keys, part, strict=True)) for part in zip(shares, losses, losses[1:], strict=False)]
        result |= {"budget": {"slices": slices}}
        result |= {"metrics": {"test_accuracy": 70.0 + slot}} if finished else {}
        return self.step(f"{arm}/pair{slot}", lines, **(result if finished else {}))

    def e2e(self, arm: str, finished: bool = True, load: bool = True, over_time: bool = False) -> Path:
        cold, final, steps, constant = _SHAPES[arm]
        start, end = cold or 10.0, final + self._noise()
        per_step = {"flops": 2.4e10 if arm == "distill" else 2.0e10, "seconds": 0.21 if arm == "distill" else 0.17}
        lines = []
        for step in range(0 if cold else 50, steps + 1, 25):
            risen = (1 - math.exp(-step / constant)) / (1 - math.exp(-steps / constant))
            accuracy = start + (end - start) * risen + (self._noise() / 2 if 0 < step < steps else 0.0)
            spent = {key: value * step for key, value in per_step.items()}
            lines.append({"step": step, "loss": 2.3 - 0.02 * accuracy, **spent} if step else {"step": 0})
            lines.append({"step": step, "test_accuracy": accuracy, "ood_accuracy": accuracy - 30.0, **spent})
            if over_time:
                lines[-1] |= self._structure(step / steps)
        if not finished:
            return self.step(f"{arm}/e2e", lines[: len(lines) // 2])
        metrics = {"test_accuracy": end, "ood_accuracy": end - 30.0}
        if cold:
            metrics |= {
                "cold_test_accuracy": cold,
                "cold_kept_test_accuracy": cold,
                "cold_folded_test_accuracy": cold - 0.1,
                "cold_dropped_test_accuracy": cold - 25,
            }
        result: dict[str, Any] = {"phase": "E2E", "arm": arm, "steps": steps, "metrics": metrics}
        result |= {key: value * steps for key, value in per_step.items()}
        if load:
            result["expert_load"] = {f"blocks.{block}": self._load() for block in range(1, 8, 2)}
            result["graph_density"] = [self._density(layer) for layer in ("propagators.0", "read_out")]
        folder = self.step(f"{arm}/e2e", lines, **result)
        if load:
            self._graph(folder)
        return folder

    def everything(self, over_time: bool = False) -> RunWriter:
        self.teacher()
        self.meta()
        self.hybrids()
        for arm in ("task", "m2mkd"):
            for slot in range(self.slots):
                self.pair(arm, slot)
        for arm in ARMS:
            self.e2e(arm, over_time=over_time)
        return self

    def _density(self, layer: str) -> dict[str, Any]:
        """Of 16 mediators or 4 outputs that hear 8 inputs and 16 mediators."""
        tiles = {"16": 1.0, "32": 0.75, "64": 1.0}
        probable = {"probable_edges": 0.0625, "probable_tiles": {"16": 0.5, "32": 1.0, "64": 1.0}}
        sizes = {"layer": layer, "receivers": 4 if layer == "read_out" else 16, "senders": 24}
        return {**sizes, "edges": 0.25, "tiles": tiles, **probable, "receivers_without_sender": 0}

    def _structure(self, progress: float) -> dict[str, Any]:
        """At an evaluation: the load evens out, the graph gets sparser."""
        uneven = 0.4 * (1 - progress)
        load = {f"blocks.{block}": [0.25 + uneven / block, 0.25 - uneven / block, 0.25, 0.25] for block in (3, 5)}
        density = {"edges": 1 - 0.75 * progress, "probable_edges": 0.5 - 0.4 * progress}
        return {"expert_load": load, "graph_density": {"propagators.0": density, "read_out": density}}

    def _graph(self, folder: Path) -> None:
        """Four cliques of mediators, and random links elsewhere."""
        links = np.random.default_rng(self.seed).integers(0, 255, (20, 24), dtype=np.uint8)
        links[:16, 8:] = 255 * np.kron(np.eye(4), np.ones((4, 4)))
        np.savez(folder / "graph.npz", links=links, num_inputs=8, num_mediators=16)

    def _noise(self) -> float:
        return self.random.uniform(-0.8, 0.8)

    def _load(self) -> list[float]:
        raw = [0.4 + self.random.random() for _ in range(4)]
        return [value / sum(raw) for value in raw]


@pytest.fixture
def run_writer(tmp_path: Path) -> type[RunWriter]:
    return RunWriter


@pytest.fixture(scope="session")
def complete_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished four-arm run; tests only read it."""
    return RunWriter(tmp_path_factory.mktemp("runs") / "glyphs").everything().folder


@pytest.fixture(scope="session")
def watched_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `complete_run`, with the load of experts and the density of graphs at every evaluation."""
    return RunWriter(tmp_path_factory.mktemp("runs") / "glyphs").everything(over_time=True).folder
