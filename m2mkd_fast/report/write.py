"""Writes the report's files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2mkd_fast.atomic import write_text_atomically
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.report.markdown import write_markdown
from m2mkd_fast.report.results import collect_results
from m2mkd_fast.report.run_folder import number, read_run

CAPTIONS = {
    "accuracy_vs_cost.png": "Test accuracy against training compute and training time, per arm",
    "pair_losses.png": "Loss of every pair and its terms against training step",
    "final_accuracy.png": "Final accuracy per arm",
    "cost_per_phase.png": "Training compute and time per arm and phase",
    "expert_load.png": "Load of every expert per layer, 1 being an equal share",
    "budget.png": "Steps that a bandit gave to each pair, by round, and how the pairs' losses fell",
    "learned_graph.png": "Probability of a link between latents, receivers by senders, mediators ordered by cluster",
    "expert_load_over_time.png": "Load of each layer's busiest and least used expert at every evaluation",
    "graph_density_over_time.png": "Density of the learned graph at every evaluation, layer by layer",
}


def write_report(run_folders: str | Path | Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Writes `report.md`, `results.json` and the plots; only the run folders are read, no model is loaded.

    Several run folders are taken as runs of one configuration with different seeds: tables and plots then show means
    and ranges. Plots whose data is missing are left out, and removed where an earlier report had written them.

    Args:
        run_folders: one run folder, or several.
        output: folder for the files; the run folder itself where None, which only one run folder allows.

    Returns:
        The path of `report.md`.

    Raises:
        M2MKDError: a folder is no run folder, a file in it is damaged, the configurations differ, or `output` is
        missing.
    """
    folders = [run_folders] if isinstance(run_folders, (str, Path)) else list(run_folders)
    if output is None and len(folders) > 1:
        raise M2MKDError(f"a report on {len(folders)} runs belongs to none of their folders; name an output folder")
    runs = [read_run(folder) for folder in folders]
    results = collect_results(runs)
    target = Path(output) if output is not None else runs[0].folder
    target.mkdir(parents=True, exist_ok=True)
    pictures = _write_plots(results, runs[0], target)
    text = json.dumps(finite(results), indent=2, allow_nan=False, default=str, ensure_ascii=False)
    write_text_atomically(target / "results.json", text + "\n")
    write_text_atomically(target / "report.md", write_markdown(results, pictures))
    return target / "report.md"


def finite(value: Any) -> Any:
    """The same structure with every number that is not finite as None: JSON has no word for it."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return number(value) if isinstance(value, float) else value


def _write_plots(results: dict[str, Any], run: Any, target: Path) -> dict[str, str]:
    from m2mkd_fast.report.plot_budget import plot_budget
    from m2mkd_fast.report.plot_graph import plot_learned_graph
    from m2mkd_fast.report.plot_losses import plot_pair_losses
    from m2mkd_fast.report.plot_over_time import plot_expert_load_over_time, plot_graph_density_over_time
    from m2mkd_fast.report.plot_race import plot_accuracy_against_cost
    from m2mkd_fast.report.plot_summaries import plot_cost_per_phase, plot_expert_load, plot_final_accuracy
    from m2mkd_fast.report.style import plot_style, save_figure

    written = {}
    with plot_style():
        figures = {
            "accuracy_vs_cost.png": plot_accuracy_against_cost(results),
            "pair_losses.png": plot_pair_losses(run),
            "final_accuracy.png": plot_final_accuracy(results),
            "cost_per_phase.png": plot_cost_per_phase(results),
            "expert_load.png": plot_expert_load(results),
            "budget.png": plot_budget(results),
            "learned_graph.png": plot_learned_graph(run),
            "expert_load_over_time.png": plot_expert_load_over_time(run),
            "graph_density_over_time.png": plot_graph_density_over_time(run),
        }
        for name, figure in figures.items():
            if figure is None:
                (target / name).unlink(missing_ok=True)
            else:
                save_figure(figure, target / name)
                written[name] = CAPTIONS[name]
    return written
