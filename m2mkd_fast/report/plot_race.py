"""The main picture: test accuracy against everything that was spent to reach it, for all arms."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from m2mkd_fast.report.costs import ARMS, QUANTITIES
from m2mkd_fast.report.style import (
    ARM_COLOURS,
    ARM_LABELS,
    ARM_MARKERS,
    TEACHER_COLOUR,
    new_figure,
    separate_labels,
)
from m2mkd_fast.report.units import Unit, flop_unit, time_unit

_EXPLANATION = (
    "Module arms start at the cost of the meta model and all pairs. Hollow marker: the assembled student before any "
    "end-to-end step.\nThin dashed: the same arm with one machine per pair. The pretrained teacher's own training is "
    "charged to no arm."
)


def plot_accuracy_against_cost(results: dict[str, Any]) -> Figure | None:
    """Two panels, training compute and seconds; None where no arm was evaluated.

    Lines are means over runs, bands their range. Curves of arms that train modules begin at the cost of the meta model
    and of all pairs; the dashed copy in the panel of seconds counts only the longest pair. Compute has no such copy:
    pairs in parallel take less time, not less work.
    """
    accuracy, cost = results["accuracy"], results["cost"]
    arms = [arm for arm in ARMS if accuracy["arms"][arm]["curve"]]
    if not arms:
        return None
    figure = new_figure(12.4, 5.7)
    panels = figure.subplots(1, 2, sharey=True)
    largest = {q: [p[q] for arm in arms for p in cost["arms"][arm]["curve"]] for q in QUANTITIES}
    units = {"flops": flop_unit(largest["flops"]), "seconds": time_unit(largest["seconds"])}
    for axes, quantity in zip(panels, QUANTITIES, strict=True):
        for arm in arms:
            _draw_arm(axes, accuracy["arms"][arm]["curve"], cost["arms"][arm], arm, quantity, units[quantity])
        axes.set_xlim(0, 1.04 * max(largest[quantity]) / units[quantity].divisor)
        _draw_teacher(axes, accuracy["teacher"]["test_accuracy"])
        axes.margins(y=0.07)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], 0))
    for axes, quantity in zip(panels, QUANTITIES, strict=True):
        _label_ends(axes, accuracy, cost, arms, quantity, units[quantity])
    panels[0].set_ylabel("test accuracy (%)")
    panels[0].set_xlabel(f"training compute spent ({units['flops'].name})")
    panels[1].set_xlabel(f"training time spent ({units['seconds'].name})")
    panels[0].set_title("Accuracy against compute")
    panels[1].set_title("Accuracy against time")
    figure.legend(
        handles=[
            Line2D([], [], color=ARM_COLOURS[arm], marker=ARM_MARKERS[arm], linewidth=2.2, label=ARM_LABELS[arm])
            for arm in arms
        ],
        loc="outside upper center",
        ncols=len(arms),
        handlelength=2.4,
    )
    figure.supxlabel(_EXPLANATION, fontsize=8.5, color="#5F6368", linespacing=1.5)
    return figure


def _draw_arm(axes: Axes, curve: list[dict], cost: dict[str, Any], arm: str, quantity: str, unit: Unit) -> None:
    colour = ARM_COLOURS[arm]
    spent = [point[quantity] / unit.divisor for point in cost["curve"]]
    mean = [point["mean"] for point in curve]
    emphasis = {"linewidth": 2.8, "zorder": 5} if arm == "m2mkd" else {"linewidth": 2.0, "zorder": 4}
    preparation = (cost["preparation"][quantity] or {}).get("mean", 0.0) / unit.divisor
    if preparation:
        if quantity == "seconds":
            parallel = cost["preparation_in_parallel"][quantity]["mean"] / unit.divisor
            shifted = [x - preparation + parallel for x in spent]
            axes.plot(shifted, mean, color=colour, alpha=0.5, linewidth=1.3, linestyle=(0, (4, 2)), zorder=3)
            axes.plot(shifted[-1:], mean[-1:], color=colour, alpha=0.5, marker=ARM_MARKERS[arm], markersize=5, zorder=3)
        # What was spent before the first end-to-end step, as a stretch along the first accuracy's height.
        axes.plot([0, spent[0]], [mean[0], mean[0]], color=colour, alpha=0.45, linewidth=1.4, linestyle=":", zorder=3)
    if any(point["max"] > point["min"] for point in curve):
        axes.fill_between(spent, [p["min"] for p in curve], [p["max"] for p in curve], color=colour, alpha=0.13, lw=0)
    axes.plot(spent, mean, color=colour, solid_joinstyle="round", **emphasis)
    if curve[0]["step"] == 0:
        axes.plot(
            spent[:1],
            mean[:1],
            marker=ARM_MARKERS[arm],
            markersize=8,
            markerfacecolor="white",
            markeredgewidth=2,
            markeredgecolor=colour,
            zorder=7,
            clip_on=False,
        )
    axes.plot(spent[-1:], mean[-1:], color=colour, marker=ARM_MARKERS[arm], markersize=7, zorder=6)


def _draw_teacher(axes: Axes, teacher: dict[str, Any] | None) -> None:
    if teacher is None:
        return
    axes.axhline(teacher["mean"], color=TEACHER_COLOUR, linewidth=1.2, linestyle=(0, (6, 4)), zorder=2)
    axes.annotate(
        f"teacher {teacher['mean']:.1f} %",
        (0, teacher["mean"]),
        xytext=(6, 4),
        textcoords="offset points",
        color=TEACHER_COLOUR,
        fontsize=9.5,
    )


def _label_ends(
    axes: Axes, accuracy: dict[str, Any], cost: dict[str, Any], arms: list[str], quantity: str, unit: Unit
) -> None:
    """Writes each arm's last accuracy in a column right of the panel, moved apart where ends crowd, tied to its end."""
    ends = [accuracy["arms"][arm]["curve"][-1]["mean"] for arm in arms]
    low, high = axes.get_ylim()
    heights = separate_labels(ends, 0.05 * (high - low))
    for arm, end, height in zip(arms, ends, heights, strict=True):
        spent = cost["arms"][arm]["curve"][-1][quantity] / unit.divisor
        right = axes.get_xlim()[1]
        axes.plot([spent, right], [end, height], color=ARM_COLOURS[arm], linewidth=0.9, alpha=0.6, ls=(0, (1, 2)))
        axes.annotate(
            f"{arm} {end:.1f}" + ("" if accuracy["arms"][arm]["final_test_accuracy"] else "\nso far"),
            (right, height),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=ARM_COLOURS[arm],
            fontsize=10,
            fontweight="bold",
            annotation_clip=False,
        )
