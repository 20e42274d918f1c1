"""Load of the experts and density of a learned graph over time: a panel an arm, a line a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from m2mkd_fast.report.costs import ARMS
from m2mkd_fast.report.run_folder import Run, number
from m2mkd_fast.report.style import ARM_COLOURS, new_figure, tint

Value = Callable[[Any], float | None]  # of one layer's entry
_DASHED = (0, (4, 2))


def plot_expert_load_over_time(run: Run) -> Figure | None:
    """Load of each mixture layer's busiest and least used expert at the evaluations of every arm's end-to-end step.

    None where no evaluation holds a load, as in runs of before it was written down.
    """
    values = {"busiest expert": lambda shares: _share(shares, max), "least used": lambda shares: _share(shares, min)}
    return _plot(run, "expert_load", "load (1 = equal share)", values)


def plot_graph_density_over_time(run: Run) -> Figure | None:
    """Share of links of each layer of a circuit, all and those of probability 1/2; None where no evaluation has it."""
    values = {
        "links": lambda layer: _percent(layer, "edges"),
        "of probability 1/2": lambda layer: _percent(layer, "probable_edges"),
    }
    return _plot(run, "graph_density", "links (%)", values)


def _plot(run: Run, key: str, label: str, values: dict[str, Value]) -> Figure | None:
    points = {arm: found for arm in ARMS if (found := _evaluations(run, arm, key))}
    if not points:
        return None
    figure = new_figure(max(3.1 * len(points) + 0.6, 5.2), 3.3)
    panels = figure.subplots(1, len(points), sharey=True, squeeze=False)[0]
    for axes, (arm, found) in zip(panels, points.items(), strict=True):
        layers = list(dict.fromkeys(name for _, entry in found for name in entry))
        for index, layer in enumerate(layers):
            colour = tint(ARM_COLOURS[arm], 0.3 + 0.7 * (index + 1) / len(layers))  # the deeper, the stronger
            for value, style in zip(values.values(), ("-", _DASHED), strict=True):
                at = [(step, number(value(entry[layer]))) for step, entry in found if layer in entry]
                at = [(step, height) for step, height in at if height is not None]
                steps, heights = zip(*at, strict=True) if at else ((), ())
                axes.plot(steps, heights, color=colour, linestyle=style, linewidth=1.6)
        axes.set_title(arm, color=ARM_COLOURS[arm])
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel(label)
    figure.supxlabel("training step, end to end", fontsize=10.5, color="#3C4043")
    lines = [
        Line2D([], [], color="#5F6368", linestyle=style, label=name)
        for name, style in zip(values, ("-", _DASHED), strict=True)
    ]
    figure.legend(handles=lines, loc="outside upper right", ncols=2, handlelength=3.2)
    return figure


def _evaluations(run: Run, arm: str, key: str) -> list[tuple[int, dict[str, Any]]]:
    step = run.steps.get(f"{arm}/e2e")
    lines = step.evaluations if step else []
    return [(line["step"], line[key]) for line in lines if isinstance(line.get(key), dict) and line[key]]


def _share(shares: Any, which: Callable[[list[float]], float]) -> float | None:
    """The largest or least of a layer's shares as a multiple of an equal one."""
    known = [number(share) for share in shares] if isinstance(shares, list) else []
    return which(known) * len(known) if known and None not in known else None


def _percent(layer: Any, name: str) -> float | None:
    share = number(layer.get(name)) if isinstance(layer, dict) else None
    return None if share is None else 100 * share
