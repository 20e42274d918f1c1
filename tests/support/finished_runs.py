"""Run folders in which steps are finished that were never run: their models are as they were initialised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m2mkd_fast.modules.state import save_module
from m2mkd_fast.pipeline.config import make_config
from m2mkd_fast.pipeline.files import write_json
from m2mkd_fast.pipeline.workbench import Workbench


def finished_bench(config: dict[str, Any], folder: Path) -> Workbench:
    """A workbench whose folder holds an untrained teacher and meta model."""
    bench = Workbench(make_config([config | {"output": str(folder)}]), folder)
    teacher = bench.teacher_chain()
    for name, model in {bench.teacher_step: teacher, "meta": bench.meta(teacher)}.items():
        digest = save_module(bench.step_folder(name) / "weights.safetensors", model, {})
        write_json(bench.step_folder(name) / "result.json", {"step": name, "weights_hash": digest})
    return bench
