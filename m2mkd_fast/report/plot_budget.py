"""What a bandit gave to each pair: steps by round above, the losses that decided below; a column an arm."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from m2mkd_fast.report.costs import MODULE_ARMS
from m2mkd_fast.report.style import ARM_COLOURS, new_figure, tint

_FAINTEST = 0.3  # of an arm's colour, for slot 0; the last slot has it full
_MOST_LEGEND_ENTRIES = 12


def plot_budget(results: dict[str, Any]) -> Figure | None:
    """Stacked bars of steps and curves of the loss, of the first run that has them; None under equal budgets."""
    for run in results["accuracy"]["runs"]:
        arms = {arm: [pair for pair in run["pairs"][arm] if pair["slices"]] for arm in MODULE_ARMS[::-1]}
        arms = {arm: pairs for arm, pairs in arms.items() if pairs}
        if arms:
            break
    else:
        return None
    figure = new_figure(1.2 + 4.6 * len(arms), 5.6)
    panels = figure.subplots(2, len(arms), squeeze=False)
    for column, (arm, pairs) in enumerate(arms.items()):
        colours = [tint(ARM_COLOURS[arm], strength) for strength in _strengths(len(pairs))]
        _draw_steps(panels[0, column], pairs, colours)
        _draw_losses(panels[1, column], pairs, colours)
        panels[0, column].set_title(arm)
        names = [Patch(color=colour, label=f"slot {pair['slot']}") for pair, colour in zip(pairs, colours, strict=True)]
        if len(names) <= _MOST_LEGEND_ENTRIES:
            panels[0, column].legend(handles=names, fontsize=8.5, ncols=min(len(names), 4), loc="upper center")
    panels[0, 0].set_ylabel("steps")
    panels[1, 0].set_ylabel("loss of the pair")
    return figure


def _strengths(count: int) -> list[float]:
    return [1.0 - (1.0 - _FAINTEST) * (count - 1 - i) / max(count - 1, 1) for i in range(count)]


def _draw_steps(axes: Axes, pairs: list[dict[str, Any]], colours: list[Any]) -> None:
    columns = range(len(pairs[0]["slices"]))
    bottom = [0] * len(columns)
    for pair, colour in zip(pairs, colours, strict=True):
        steps = [part["steps"] for part in pair["slices"]]
        axes.bar(columns, steps, bottom=bottom, color=colour, edgecolor="white", linewidth=0.8)
        bottom = [low + high for low, high in zip(bottom, steps, strict=True)]
    axes.set_ylim(top=1.35 * max(bottom) or 1.0)  # the legend stands above the bars
    labels = [*map(str, columns[:-1]), "end"]
    every = max(1, len(labels) // 10)
    shown = sorted({*columns[:-1][::every], columns[-1]})
    axes.set_xticks(shown, [labels[i] for i in shown])
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("round, and the end with a falling learning rate")


def _draw_losses(axes: Axes, pairs: list[dict[str, Any]], colours: list[Any]) -> None:
    for pair, colour in zip(pairs, colours, strict=True):
        steps = [0, *accumulate(part["steps"] for part in pair["slices"])]
        losses = [pair["slices"][0]["loss_before"], *(part["loss_after"] for part in pair["slices"])]
        axes.plot(steps, losses, color=colour, linewidth=2.0, marker="o", markersize=3.5)
    axes.set_ylim(bottom=min(0.0, *axes.get_ylim()))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("training step of the pair")
