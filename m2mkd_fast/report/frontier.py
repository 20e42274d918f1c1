"""Accuracy against speed of a pruned model: a picture and a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m2mkd_fast.atomic import write_text_atomically
from m2mkd_fast.report.style import ARM_COLOURS, halo, new_figure, plot_style, save_figure


def write_frontier(folder: Path, points: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[Path]:
    """Writes `pruning.json` and `pruning.png`, and returns their paths.

    Args:
        folder: must exist.
        points: each with `mediators`, `accuracy` (per cent), `latency_ms` and `speedup`.
        facts: what was measured, and where; `title` heads the picture.
    """
    text = json.dumps({**facts, "points": [dict(point) for point in points]}, indent=2)
    write_text_atomically(folder / "pruning.json", text + "\n")
    with plot_style():
        figure = new_figure(7.2, 4.6)
        axes = figure.subplots()
        # Not latencies: a ratio of passes made in turns holds on a busy machine, too.
        speedups = [point["speedup"] for point in points]
        accuracies = [point["accuracy"] for point in points]
        axes.plot(speedups, accuracies, color=ARM_COLOURS["m2mkd"], marker="o", linewidth=2.0)
        for point in points:
            axes.annotate(
                f"{point['mediators']} mediators\n{point['latency_ms']:.1f} ms",
                (point["speedup"], point["accuracy"]),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                path_effects=halo(),
            )
        axes.set_xlim(0, 1.12 * max(speedups))
        axes.margins(y=0.25)
        axes.set_xlabel("times as fast as the whole circuit")
        axes.set_ylabel("accuracy (%)")
        axes.set_title(str(facts.get("title", "Latents removed")))
        save_figure(figure, folder / "pruning.png")
    return [folder / "pruning.json", folder / "pruning.png"]
