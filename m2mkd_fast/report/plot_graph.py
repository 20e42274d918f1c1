"""The learned graph of a Neural Attentive Circuit as a matrix: who hears whom."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.report.costs import ARMS
from m2mkd_fast.report.run_folder import Run
from m2mkd_fast.report.style import ARM_COLOURS, new_figure


class _Graph(NamedTuple):
    """``links``, uint8 ``[mediators + outputs, inputs + mediators]``, are probabilities in units of 1/255."""

    links: np.ndarray
    num_inputs: int
    num_mediators: int


def plot_learned_graph(run: Run) -> Figure | None:
    """A matrix an arm, of its final circuit: rows receive, columns send; None where no arm has a learned graph.

    Of several runs the first is shown: latents of different seeds have nothing to do with each other.

    Raises:
        M2MKDError: a step's `graph.npz` is damaged.
    """
    paths = {arm: run.folder / "steps" / arm / "e2e" / "graph.npz" for arm in ARMS}
    graphs = {arm: _read(path) for arm, path in paths.items() if path.is_file()}
    if not graphs:
        return None
    columns = min(len(graphs), 2)
    rows = -(-len(graphs) // columns)
    figure = new_figure(5.6 * columns + 1.0, 4.9 * rows + 0.3)
    panels = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axes, (arm, graph) in zip(panels.flat, graphs.items(), strict=False):
        image = axes.imshow(graph.links / 255, cmap="BuPu", vmin=0.0, vmax=1.0, interpolation="nearest")
        _label_groups(axes, graph)
        between = graph.links[: graph.num_mediators, graph.num_inputs :]
        axes.set_title(f"{arm}: {100 * (between > 0).mean():.0f} % of mediators' pairs linked", color=ARM_COLOURS[arm])
    for axes in panels.flat[len(graphs) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=panels, shrink=0.8, aspect=30, pad=0.02)
    bar.set_label("link probability, mean over propagators")
    bar.outline.set_visible(False)
    return figure


def _read(path: Path) -> _Graph:
    try:
        with np.load(path, allow_pickle=False) as file:
            graph = _Graph(file["links"], int(file["num_inputs"]), int(file["num_mediators"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise M2MKDError(
            f"'{path}' is damaged: it should hold a learned graph ({error}); delete it to report without the picture, "
            "or delete the step's folder and run the step again"
        ) from error
    return graph


def _label_groups(axes: Axes, graph: _Graph) -> None:
    """Names of the latents' sets at their middle, and lines between them."""
    height, width = graph.links.shape
    axes.axvline(graph.num_inputs - 0.5, color="#5F6368", linewidth=0.8)
    axes.axhline(graph.num_mediators - 0.5, color="#5F6368", linewidth=0.8)
    axes.set_xticks([graph.num_inputs / 2 - 0.5, (graph.num_inputs + width) / 2 - 0.5], ["inputs", "mediators"])
    axes.set_yticks([graph.num_mediators / 2 - 0.5, (graph.num_mediators + height) / 2 - 0.5])
    axes.set_yticklabels(["mediators", "outputs"], rotation=90, va="center")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel("senders")
    axes.set_ylabel("receivers")
