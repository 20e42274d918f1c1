"""Losses of the pairs: one panel a slot, colour by arm, line style by term."""

from __future__ import annotations

from math import ceil

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from m2mkd_fast.report.costs import MODULE_ARMS
from m2mkd_fast.report.run_folder import Run, Step, number
from m2mkd_fast.report.style import ARM_COLOURS, new_figure

_LINE_STYLES = {"total": "-", "task": (0, (5, 2)), "distillation": (0, (1, 1.2)), "feature": (0, (5, 1.5, 1, 1.5))}
_OTHER_STYLE = (0, (3, 1, 1, 1, 1, 1))
_POINTS = 60  # a panel shows about this many means; single batches would be a band of noise


def plot_pair_losses(run: Run) -> Figure | None:
    """Loss against training step for every pair of both module arms; None where no pair has a training line."""
    pairs = {arm: [step for step in run.pairs(arm) if step.training] for arm in MODULE_ARMS}
    slots = sorted({step.slot for steps in pairs.values() for step in steps})
    if not slots:
        return None
    columns = min(len(slots), 4 if len(slots) != 5 and len(slots) != 10 else 5)
    rows = ceil(len(slots) / columns)
    figure = new_figure(3.1 * columns + 0.6 + (3.0 if columns == 1 else 0), 2.7 * rows + 0.9)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    drawn: set[tuple[str, str]] = set()
    for axes, slot in zip(panels.flat, slots, strict=False):
        for arm in MODULE_ARMS:
            for step in pairs[arm]:
                if step.slot == slot:
                    drawn |= _draw_pair(axes, step, arm)
        axes.set_title(f"slot {slot}")
    for axes in panels.flat[len(slots) :]:
        axes.set_visible(False)
    values = [value for axes in panels.flat for line in axes.lines for value in line.get_ydata() if value > 0]
    if values and max(values) > 40 * min(values):
        panels[0, 0].set_yscale("log")
        panels[0, 0].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panels[0, 0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels[0, 0].yaxis.set_minor_locator(NullLocator())
    elif values:
        panels[0, 0].set_ylim(bottom=0)
    figure.supxlabel("training step of the pair", fontsize=10.5, color="#3C4043")
    figure.supylabel("loss", fontsize=10.5, color="#3C4043")
    figure.legend(handles=_handles(drawn), loc="outside upper center", ncols=min(len(drawn), 6), handlelength=3.2)
    return figure


def series(step: Step, term: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the total loss or of a term, averaged over windows; not-finite values are left out."""
    lines = [
        (line["step"], line["loss"] if term == "total" else (line.get("terms") or {}).get(term))
        for line in step.training
    ]
    points = [(float(at), value) for at, raw in lines if (value := number(raw)) is not None]
    width = max(1, len(points) // _POINTS)
    windows = [points[start : start + width] for start in range(0, len(points), width)]
    return (
        [sum(at for at, _ in window) / len(window) for window in windows],
        [sum(value for _, value in window) / len(window) for window in windows],
    )


def _draw_pair(axes: Axes, step: Step, arm: str) -> set[tuple[str, str]]:
    terms = [name for line in step.training[:1] for name in (line.get("terms") or {})]
    if arm == "task":
        terms = []  # its total is its task term
    drawn = set()
    for term in ["total", *terms]:
        steps, values = series(step, term)
        if not values or not any(values):
            continue  # a term whose weight is zero is no curve
        axes.plot(
            steps,
            values,
            color=ARM_COLOURS[arm],
            linestyle=_LINE_STYLES.get(term, _OTHER_STYLE),
            linewidth=2.0 if term == "total" else 1.3,
            alpha=1.0 if term == "total" else 0.8,
        )
        drawn.add((arm, term))
    return drawn


def _handles(drawn: set[tuple[str, str]]) -> list[Line2D]:
    order = sorted(drawn, key=lambda pair: (MODULE_ARMS[::-1].index(pair[0]), pair[1] != "total", pair[1]))
    return [
        Line2D(
            [],
            [],
            color=ARM_COLOURS[arm],
            linestyle=_LINE_STYLES.get(term, _OTHER_STYLE),
            linewidth=2.0 if term == "total" else 1.3,
            label=f"{arm}: {term}",
        )
        for arm, term in order
    ]
