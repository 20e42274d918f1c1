"""Looks that every plot shares: one colour and one marker per arm (told apart without colour too), quiet axes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import Stroke, withStroke

# From the palette of Okabe and Ito, which readers with colour-vision deficiencies can tell apart.
ARM_COLOURS = {"scratch": "#5F6368", "distill": "#009E73", "task": "#0072B2", "m2mkd": "#D55E00"}
ARM_MARKERS = {"scratch": "s", "distill": "^", "task": "D", "m2mkd": "o"}
ARM_LABELS = {
    "scratch": "scratch: end to end",
    "distill": "distill: whole model",
    "task": "task: modules, task loss",
    "m2mkd": "m2mkd: modules, distilled",
}
TEACHER_COLOUR = "#202124"
_DPI = 160

_STYLE = {
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9AA0A6",
    "axes.labelcolor": "#3C4043",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E8EAED",
    "grid.linewidth": 0.9,
    "xtick.color": "#5F6368",
    "ytick.color": "#5F6368",
    "legend.frameon": False,
}


@contextmanager
def plot_style() -> Iterator[None]:
    """The shared looks, inside the `with` block only: a caller's own matplotlib settings stay as they are."""
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure of width x height inches that draws with Agg whatever display and backend the process has."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})


def tint(colour: str, strength: float) -> tuple[float, float, float]:
    """`colour` mixed with white: 1 leaves it, 0 is white."""
    red, green, blue = (1 - strength * (1 - channel) for channel in to_rgb(colour))
    return red, green, blue


def separate_labels(positions: list[float], least_gap: float) -> list[float]:
    """Label heights near `positions`, in their order, at least `least_gap` apart, their mean shift zero per crowd."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    crowds: list[list[float]] = []  # [sum of wished heights, members]
    for index in order:
        crowds.append([positions[index], 1.0])
        while len(crowds) > 1 and _top(crowds[-2], least_gap) + least_gap > _bottom(crowds[-1], least_gap):
            total, members = crowds.pop()
            crowds[-1][0] += total
            crowds[-1][1] += members
    heights = [_bottom(crowd, least_gap) + place * least_gap for crowd in crowds for place in range(round(crowd[1]))]
    separated = [0.0] * len(positions)
    for index, height in zip(order, heights, strict=True):
        separated[index] = height
    return separated


def halo() -> list[Stroke]:
    """A white rim that keeps a label readable where curves run behind it."""
    return [withStroke(linewidth=3, foreground="white")]


def despine_left(axes: Axes) -> None:
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _bottom(crowd: list[float], gap: float) -> float:
    return crowd[0] / crowd[1] - gap * (crowd[1] - 1) / 2


def _top(crowd: list[float], gap: float) -> float:
    return crowd[0] / crowd[1] + gap * (crowd[1] - 1) / 2
