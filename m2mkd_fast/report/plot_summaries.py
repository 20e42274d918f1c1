"""Final accuracy of the arms, cost per phase, and how the tokens were spread over the experts."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from m2mkd_fast.report.costs import ARMS, PHASES, QUANTITIES
from m2mkd_fast.report.style import ARM_COLOURS, ARM_MARKERS, TEACHER_COLOUR, despine_left, halo, new_figure, tint
from m2mkd_fast.report.units import flop_unit, time_unit

_PHASE_LABELS = {
    "PT": "meta model (PT)",
    "MT": "teacher modules (MT)",
    "FT": "teacher fine-tuning (FT)",
    "cache": "features of the pairs (cache)",
    "m2mKD": "pairs (m2mKD)",
    "E2E": "end to end (E2E)",
}
_PHASE_STRENGTH = {"PT": 0.25, "MT": 0.38, "FT": 0.5, "cache": 0.57, "m2mKD": 0.65, "E2E": 1.0}
_MOST_CELL_FIGURES = 400


def plot_final_accuracy(results: dict[str, Any]) -> Figure | None:
    """A row an arm: each run's final accuracy as a point, their range as a bar; out-of-distribution accuracy hollow."""
    accuracy = results["accuracy"]
    arms = [arm for arm in ARMS if accuracy["arms"][arm]["final_test_accuracy"]]
    if not arms:
        return None
    figure = new_figure(8.6, 1.5 + 0.85 * len(arms))
    axes = figure.subplots()
    has_ood = False
    for row, arm in enumerate(reversed(arms)):
        for key, hollow in (("final_test_accuracy", False), ("final_ood_accuracy", True)):
            statistic = accuracy["arms"][arm][key]
            if statistic:
                has_ood |= hollow
                _draw_spread(axes, statistic, arm, row - 0.2 * hollow, hollow)
    teacher = accuracy["teacher"]["test_accuracy"]
    if teacher:
        axes.axvline(teacher["mean"], color=TEACHER_COLOUR, linewidth=1.2, linestyle=(0, (6, 4)), zorder=1)
        axes.annotate(
            f"teacher {teacher['mean']:.1f}",
            (teacher["mean"], len(arms) - 0.42),
            xytext=(0, 0),
            ha="center",
            path_effects=halo(),
            textcoords="offset points",
            color=TEACHER_COLOUR,
            fontsize=9,
        )
    axes.set_yticks(range(len(arms)), list(reversed(arms)), fontweight="bold")
    _colour_arm_names(axes, arms)
    axes.set_ylim(-0.7, len(arms) - 0.2)
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)
    despine_left(axes)
    axes.set_xlabel("accuracy (%)")
    runs = len(results["runs"])
    axes.set_title("Final accuracy" + (f", mean and range of {runs} runs" if runs > 1 else ", one run"))
    if has_ood:
        marks = [
            Line2D([], [], linestyle="", marker="o", color="#5F6368", label="test"),
            Line2D(
                [], [], linestyle="", marker="o", color="#5F6368", markerfacecolor="white", label="out of distribution"
            ),
        ]
        figure.legend(handles=marks, loc="outside lower right", ncols=2)
    return figure


def plot_cost_per_phase(results: dict[str, Any]) -> Figure | None:
    """Stacked bars an arm, in training FLOPs and in seconds, each split into phases; means over runs."""
    runs = [run for run in results["cost"]["runs"] if any(run["arms"].values())]
    arms = [arm for arm in ARMS if any(run["arms"][arm] for run in runs)]
    if not arms:
        return None
    figure = new_figure(12.4, 1.9 + 0.6 * len(arms))
    panels = figure.subplots(1, 2, sharey=True)
    used: set[str] = set()
    for axes, quantity in zip(panels, QUANTITIES, strict=True):
        mean = {
            arm: {
                phase: _mean([r["arms"][arm]["phases"][phase][quantity] for r in runs if r["arms"][arm]])
                for phase in PHASES
            }
            for arm in arms
        }
        totals = {arm: sum(mean[arm].values()) for arm in arms}
        unit = (flop_unit if quantity == "flops" else time_unit)(totals.values())
        for row, arm in enumerate(reversed(arms)):
            left = 0.0
            for phase in PHASES:
                width = mean[arm][phase] / unit.divisor
                if width > 0:
                    used.add(phase)
                    colour = tint(ARM_COLOURS[arm], _PHASE_STRENGTH[phase])
                    axes.barh(row, width, left=left, height=0.62, color=colour, edgecolor="white", linewidth=1.2)
                    left += width
            axes.annotate(
                unit.figure(totals[arm]),
                (left, row),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9.5,
            )
        axes.set_xlim(0, 1.12 * max(totals.values()) / unit.divisor or 1.0)
        axes.set_yticks(range(len(arms)), list(reversed(arms)), fontweight="bold")
        axes.grid(axis="y", visible=False)
        despine_left(axes)
        axes.set_xlabel(f"training compute ({unit.name})" if quantity == "flops" else f"training time ({unit.name})")
    _colour_arm_names(panels[0], arms)
    panels[0].set_title("Compute per phase")
    panels[1].set_title("Time per phase")
    figure.legend(
        handles=[Patch(color=tint("#5F6368", _PHASE_STRENGTH[p]), label=_PHASE_LABELS[p]) for p in PHASES if p in used],
        loc="outside upper center",
        ncols=len(used),
    )
    return figure


def plot_expert_load(results: dict[str, Any]) -> Figure | None:
    """Heat map per arm of its final model's load: rows are layers, columns experts, in multiples of an equal share.

    Of several runs the first is shown: expert 0 of one seed has nothing to do with expert 0 of another, so a mean over
    runs would show a balance that no run has.
    """
    steps = results["accuracy"]["runs"][0]["expert_load"]
    loads = {arm: steps[f"{arm}/e2e"] for arm in ARMS if f"{arm}/e2e" in steps}
    if not loads:
        return None
    tables = {arm: _load_table(layers) for arm, layers in loads.items()}
    widest = max(table.shape[1] for table in tables.values())
    columns = min(len(tables), 2 if widest <= 16 else 1)
    rows = -(-len(tables) // columns)
    tallest = max(table.shape[0] for table in tables.values())
    figure = new_figure(columns * min(max(3.6, 0.62 * widest + 1.6), 11.0) + 1.0, rows * (0.42 * tallest + 1.2) + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False)
    highest = max(2.0, *(float(np.nanmax(table)) for table in tables.values()))
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=highest)
    image = None
    for axes, (name, table) in zip(panels.flat, tables.items(), strict=False):
        image = axes.imshow(table, cmap="PuOr_r", norm=norm, aspect="auto")
        if table.size <= _MOST_CELL_FIGURES:
            for (row, column), value in np.ndenumerate(table):
                if np.isfinite(value):
                    dark = value < 0.25 or value > 1 + 0.6 * (highest - 1)
                    axes.text(
                        column,
                        row,
                        f"{value:.2f}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if dark else "#202124",
                    )
        axes.set_xticks(range(0, table.shape[1], max(1, table.shape[1] // 16)))
        axes.set_yticks(range(table.shape[0]), list(loads[name]))
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlabel("expert")
        axes.set_title(name, color=ARM_COLOURS[name])
    for axes in panels.flat[len(tables) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=panels, shrink=0.9, aspect=25, pad=0.02)
    bar.set_label("load (1 = equal share)")
    bar.outline.set_visible(False)
    return figure


def _colour_arm_names(axes: Axes, arms: list[str]) -> None:
    for label, arm in zip(axes.get_yticklabels(), reversed(arms), strict=True):
        label.set_color(ARM_COLOURS[arm])


def _draw_spread(axes: Axes, statistic: dict[str, Any], arm: str, height: float, hollow: bool) -> None:
    colour = ARM_COLOURS[arm]
    values = [value for value in statistic["values"] if value is not None]
    if len(values) > 1:
        axes.plot(
            [statistic["min"], statistic["max"]],
            [height, height],
            color=colour,
            linewidth=7,
            alpha=0.22,
            solid_capstyle="round",
        )
        axes.plot([statistic["mean"]] * 2, [height - 0.13, height + 0.13], color=colour, linewidth=2.4)
    axes.plot(
        values,
        [height] * len(values),
        linestyle="",
        marker=ARM_MARKERS[arm],
        markersize=6 if hollow else 7,
        color=colour,
        markerfacecolor="white" if hollow else colour,
        markeredgewidth=1.6,
        alpha=0.9,
        zorder=4,
    )
    axes.annotate(
        f"{statistic['mean']:.1f}",
        (statistic["mean"], height),
        xytext=(0, -10 if hollow else 10),
        textcoords="offset points",
        ha="center",
        va="top" if hollow else "bottom",
        path_effects=halo(),
        color=colour,
        fontsize=9 if hollow else 10.5,
        fontweight="normal" if hollow else "bold",
    )


def _load_table(layers: dict[str, list[float]]) -> np.ndarray:
    """[layers, experts] load as a multiple of the layer's equal share; layers with fewer experts end in NaN."""
    table = np.full((len(layers), max(len(fractions) for fractions in layers.values())), np.nan)
    for row, fractions in enumerate(layers.values()):
        shares = np.asarray(fractions, dtype=float)
        table[row, : len(shares)] = shares * len(shares)
    return table


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
