"""What a step writes down while it trains: ``metrics.jsonl``, ``metrics.csv``, and what goes into their lines."""

from __future__ import annotations

import csv
import io
import json
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from m2mkd_fast.atomic import unwritable, write_text_atomically
from m2mkd_fast.models.nac.circuit import NeuralAttentiveCircuit
from m2mkd_fast.models.nac.links import density_report
from m2mkd_fast.nn.vision_moe import expert_load
from m2mkd_fast.pipeline.utilisation import compute_dtype, peak_flops

Tracker = Callable[[Mapping[str, Any]], None]  # told every entry that the file gets; must not raise


class MetricsFile:
    """``metrics.jsonl`` of a step, one JSON object a line in the order of the steps, and the same as a table.

    The table beside it, ``metrics.csv``, holds the entries' numbers (:func:`flat_numbers`); an entry with a new one
    adds a column. It is made from the JSON lines at every opening, so both lose the same lines after a resumption.

    Args:
        path: of the JSON lines.
        keep_until: lines after this training step belong to work that was lost, and go.
        tracker: told every entry that is appended.

    Raises:
        M2MKDError: a file cannot be written.
    """

    def __init__(self, path: Path, keep_until: int, tracker: Tracker | None = None) -> None:
        self.path, self.table, self._tracker = path, path.with_suffix(".csv"), tracker
        kept = [entry for entry in _entries(path) if entry["step"] <= keep_until]
        write_text_atomically(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._write_table()

    def append(self, entry: dict[str, Any]) -> None:
        _append(self.path, json.dumps(entry) + "\n")
        row = flat_numbers(entry)
        if row.keys() <= set(self._columns):
            _append(self.table, _as_csv([[row.get(column, "") for column in self._columns]]))
        else:
            self._write_table()
        if self._tracker is not None:
            self._tracker(entry)

    def _write_table(self) -> None:
        rows = [flat_numbers(entry) for entry in _entries(self.path)]
        self._columns = list(dict.fromkeys(["step", *(column for row in rows for column in row)]))
        cells = [[row.get(column, "") for column in self._columns] for row in rows]
        write_text_atomically(self.table, _as_csv([self._columns, *cells]))


def flat_numbers(entry: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """An entry's numbers by dotted names: ``{"terms": {"task": 0.5}}`` has ``terms.task``. Lists are left out."""
    flat: dict[str, float] = {}
    for name, value in entry.items():
        if isinstance(value, Mapping):
            flat |= flat_numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[f"{prefix}{name}"] = value
    return flat


class Meter:
    """Memory, pace and utilisation of a training run between two looks at it; see :meth:`read`.

    Args:
        device: that trains.
        autocast: the context under which it does.
        images, seconds, flops: running totals at the start, those of a checkpoint where one goes on.
    """

    def __init__(
        self, device: torch.device, autocast: torch.autocast, images: int = 0, seconds: float = 0.0, flops: float = 0.0
    ) -> None:
        self.device, self.dtype = device, compute_dtype(autocast, device)
        self._last = (images, seconds, flops)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # a worker's earlier steps are not this one's

    def read(self, images: int, seconds: float, flops: float) -> dict[str, float]:
        """Facts for an entry, from running totals; call it where the host has waited for the device anyway.

        - ``peak_memory_bytes``: the most that was allocated on a GPU in this step; without one the most that the
          process ever held in memory, its earlier steps included (the system keeps no other count).
        - ``recent_images_per_second``: since the last look.
        - ``model_flop_utilisation``: of the time since then, FLOPs a second over the device's peak for the precision
          (:func:`~m2mkd_fast.pipeline.utilisation.peak_flops`); left out where that is unknown.
        """
        done, took, computed = (now - then for now, then in zip((images, seconds, flops), self._last, strict=True))
        self._last = (images, seconds, flops)
        facts: dict[str, float] = {"peak_memory_bytes": self._peak_memory()}
        if took > 0:
            facts["recent_images_per_second"] = done / took
            peak = peak_flops(self.device, self.dtype)
            if peak is not None:
                facts["model_flop_utilisation"] = computed / took / peak
        return facts

    def _peak_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else 1024 * largest  # bytes there, kibibytes elsewhere


def model_facts(model: nn.Module) -> dict[str, Any]:
    """What a model that has just been evaluated shows of itself, for an entry at an evaluation.

    Returns:
        ``expert_load``: per mixture layer every expert's share of the last batch's tokens; ``expert_imbalance``: the
        largest of these shares in multiples of an equal one; ``graph_density``: per layer of a circuit the share of
        links that are there (``edges``) and of those of probability 1/2 at least (``probable_edges``). Empty for
        models without either.
    """
    facts: dict[str, Any] = {}
    load = expert_load(model)
    if load:
        facts["expert_load"] = load
        facts["expert_imbalance"] = {name: max(shares) * len(shares) for name, shares in load.items()}
    if isinstance(model, NeuralAttentiveCircuit):
        layers = (asdict(layer) for layer in density_report(model))
        facts["graph_density"] = {
            layer["layer"]: {name: layer[name] for name in ("edges", "probable_edges")} for layer in layers
        }
    return facts


def _entries(path: Path) -> list[dict[str, Any]]:
    """The lines of a file up to the first that is none: there the process was killed in the middle of one."""
    entries = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def _as_csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a") as file:
            file.write(text)
    except OSError as error:
        raise unwritable(path, error) from error
