"""The opening of a run folder: checks that it belongs to this configuration, then what stands in it before any step."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from m2mkd_fast.atomic import write_text_atomically
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.pipeline.config import RunConfig, load_config, make_config
from m2mkd_fast.pipeline.environment import environment
from m2mkd_fast.pipeline.files import read_json, write_json
from m2mkd_fast.pipeline.lease import hold
from m2mkd_fast.pipeline.plan import Step, training_steps
from m2mkd_fast.pipeline.workbench import Workbench

# Keys that may differ between two starts of one run: they say where and how it computes, not what.
_MAY_CHANGE = ("output", "device", "threads", "data.num_workers", "parallel.*", "trackers", "*.keep_checkpoints")


def open_run_folder(bench: Workbench, steps: list[Step], slots: int, command: str | None = None) -> None:
    """Write ``run.json``, ``plan.json`` and ``config.yaml``, or check those of an earlier start.

    Args:
        bench: with the folder and the configuration.
        steps: the whole plan.
        slots: of the teacher.
        command: the command line to write down.

    Raises:
        M2MKDError: the folder belongs to another configuration or to other images, a finished step was made from
            something else than what is there now, or a file cannot be written.
    """
    folder, config = bench.folder, bench.config
    with hold(folder / "lease"):  # two launchers may come at once
        check_same_configuration(config, folder)
        _check_same_data(bench)
        _check_provenance(bench, steps)
        rows = [asdict(step) | {"training_steps": training_steps(config, step, slots)} for step in steps]
        if not (folder / "plan.json").exists():
            write_json(folder / "plan.json", rows)
        if (folder / "config.yaml").exists():
            return
        typed = command or " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        write_json(folder / "run.json", environment() | {"command": typed, "data": bench.dataset.describe()})
        write_text_atomically(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config.to_dict())))


def opened(folder: Path, overrides: list[str]) -> RunConfig:
    """The configuration of a run folder, with overrides for this start.

    Raises:
        M2MKDError: the folder is no opened run, or an override changes what is computed.
    """
    path = folder / "config.yaml"
    if not path.is_file() or not (folder / "plan.json").is_file():
        raise M2MKDError(f"{folder} is no opened run (it needs config.yaml and plan.json); m2mkd run CONFIG makes one")
    config = load_config(path, [*overrides, f"output={folder}"])
    check_same_configuration(config, folder)
    return config


def planned_step(folder: Path, name: str) -> Step:
    """A step of an opened run folder's plan."""
    known = {entry.name for entry in fields(Step)}
    steps = [
        Step(**{key: tuple(value) if key == "needs" else value for key, value in row.items() if key in known})
        for row in read_json(folder / "plan.json")
    ]
    for step in steps:
        if step.name == name:
            return step
    raise UnknownNameError("step", name, [step.name for step in steps])


def own_settings(config: RunConfig, folder: Path) -> list[str]:
    """As ``key=value`` what this start sets otherwise than the run folder's ``config.yaml``."""
    differing = _differing(config, folder)
    return [f"{key}={json.dumps(now)}" for key, (_, now) in differing.items() if key != "output"]


def check_same_configuration(config: RunConfig, folder: Path) -> None:
    """Refuse a folder that was made with another configuration; a key that it does not know yet has its default."""
    if not (folder / "config.yaml").exists():
        return
    differing = [
        f"{key} (there {there!r}, now {now!r})"
        for key, (there, now) in _differing(config, folder).items()
        if not any(fnmatch(key, pattern) for pattern in _MAY_CHANGE)
    ]
    if differing:
        raise M2MKDError(
            f"{folder} was made with another configuration: {'; '.join(differing)}. Give this one a folder of its own "
            f"with output=FOLDER, or delete {folder}"
        )


def _differing(config: RunConfig, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Keys whose values in ``config.yaml`` and now are not the same, with both."""
    now, there = _flat(config.to_dict()), _flat(make_config([OmegaConf.load(folder / "config.yaml")]).to_dict())
    keys = sorted(now.keys() | there.keys())
    return {key: (there.get(key), now.get(key)) for key in keys if there.get(key) != now.get(key)}


def _check_same_data(bench: Workbench) -> None:
    path = bench.folder / "run.json"
    if path.exists() and read_json(path)["data"]["content_hash"] != bench.dataset.describe()["content_hash"]:
        raise M2MKDError(
            f"the images of {bench.config.data.spec!r} are not those that {bench.folder} was begun with; bring them "
            "back, or give this run a folder of its own with output=FOLDER"
        )


def _check_provenance(bench: Workbench, steps: list[Step]) -> None:
    """Every finished step must have been made from what its folder's neighbours hold now."""
    for step in steps:
        result = bench.result(step.name)
        for need, digest in (result or {}).get("made_from", {}).items():
            source = bench.result(need)
            if source is None or source["weights_hash"] != digest:
                raise M2MKDError(
                    f"step {step.name} was made from another {need} than the one that is there now; delete "
                    f"{bench.step_folder(step.name)} to make it again, or put the old {need} back"
                )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.")
    return flat
