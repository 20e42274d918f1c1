"""report.md from the results: tables first, then pictures, then what follows from the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from m2mkd_fast.report.budget import budget_table
from m2mkd_fast.report.costs import ARMS, MODULE_ARMS
from m2mkd_fast.report.run_folder import flatten, number
from m2mkd_fast.report.throughput import throughput_table
from m2mkd_fast.report.units import (
    MISSING,
    Unit,
    accuracy_text,
    difference_text,
    flop_unit,
    join_words,
    significant,
    time_unit,
)

_LONGEST_CONFIG = 60


def main_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of the arms' table; the terminal shows the same one."""
    cost, accuracy = results["cost"], results["accuracy"]
    teachers = [run["teacher"] for run in cost["runs"] if run["teacher"]]
    totals = {q: [(cost["arms"][a]["total"][q] or {}).get("mean") for a in ARMS] for q in ("flops", "seconds")}
    flops = flop_unit([*totals["flops"], *(teacher["flops"] for teacher in teachers)])
    seconds = time_unit([*totals["seconds"], *(teacher["seconds"] for teacher in teachers)])
    heads = [
        "arm",
        "training steps",
        f"training {flops.name}s",
        f"time ({seconds.name})",
        "cold accuracy, stitches kept / folded / dropped (%)",
        "final accuracy (%)",
        "OOD accuracy (%)",
    ]
    rows = [_teacher_row(results, flops, seconds)] if teachers or accuracy["teacher"]["test_accuracy"] else []
    for arm in ARMS:
        part, spent = accuracy["arms"][arm], cost["arms"][arm]["total"]
        if spent["flops"] is None:
            rows.append([arm, "not run", *[MISSING] * 5])
            continue
        rows.append(
            [
                arm,
                _steps_text(results, arm),
                flops.figure((spent["flops"] or {}).get("mean")),
                seconds.figure((spent["seconds"] or {}).get("mean")),
                _cold_text(part),
                spread_text(part["final_test_accuracy"]) if part["final_test_accuracy"] else _unfinished_text(part),
                spread_text(part["final_ood_accuracy"]),
            ]
        )
    return heads, rows


def spread_text(statistic: dict[str, Any] | None) -> str:
    """`81.2`, or `81.2 (80.7 to 81.9)` for several runs."""
    if statistic is None:
        return MISSING
    if sum(value is not None for value in statistic["values"]) == 1:
        return accuracy_text(statistic["mean"])
    return f"{statistic['mean']:.1f} ({statistic['min']:.1f} to {statistic['max']:.1f})"


def write_markdown(results: dict[str, Any], pictures: dict[str, str]) -> str:
    """The report as Markdown; `pictures` maps file names that were written to their captions."""
    names = [run["folder"] for run in results["runs"]]
    sections = [f"# Report: {join_words(names)}", _what_was_run(results), "## Arms", _table(*main_table(results))]
    sections.append(_cost_rules(results))
    if "accuracy_vs_cost.png" in pictures:
        sections.append(_picture("accuracy_vs_cost.png", pictures))
    if results["notes"]:
        sections += ["## What the numbers say", "\n".join(f"- {note}" for note in results["notes"])]
    sections += ["## Hybrids", _hybrids_section(results), "## Pairs", _pairs_section(results)]
    for title, name in (
        (None, "pair_losses.png"),
        ("## Final accuracy", "final_accuracy.png"),
        ("## Cost per phase", "cost_per_phase.png"),
        ("## Expert load", "expert_load.png"),
        (None if "expert_load.png" in pictures else "## Expert load", "expert_load_over_time.png"),
    ):
        if name in pictures:
            sections += [title] if title else []
            sections.append(_picture(name, pictures))
    budget, *table = budget_table(results)
    if budget:
        sections += ["## Budget", budget, _table(*_without_single(*table))]
        sections += [_picture("budget.png", pictures)] if "budget.png" in pictures else []
    density = _graph_section(results)
    graph = [name for name in ("learned_graph.png", "graph_density_over_time.png") if name in pictures]
    if density or graph:
        sections += ["## Learned graph", *(_picture(name, pictures) for name in graph)]
        sections += [density] if density else []
    throughput = _throughput_section(results)
    sections += ["## Throughput and memory", throughput] if throughput else []
    missing = [(run["folder"], sentence) for run in results["runs"] for sentence in run["missing"]]
    sections.append("## Missing")
    if missing:
        several = len(names) > 1
        sections.append("\n".join(f"- {f'{folder}: ' if several else ''}{sentence}" for folder, sentence in missing))
    else:
        sections.append("Nothing: every step of the four arms finished.")
    sections.append("## Configuration\n\n" + _config_section(results["config"]))
    return "\n\n".join(sections) + "\n"


def _what_was_run(results: dict[str, Any]) -> str:
    info = results["runs"][0]["info"]
    seeds = [str(run["seed"]) for run in results["runs"] if run["seed"] is not None]
    rows = [("Runs", str(len(results["runs"])))] if len(results["runs"]) > 1 else []
    if seeds:
        rows.append(("Seed" if len(seeds) == 1 else "Seeds", ", ".join(seeds)))
    for key, label in (("created", "Created"), ("commit", "Commit"), ("command", "Command")):
        value = info.get(key)
        if value:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((label, f"`{text}`" if key != "created" else text))
    for key, label in (("machine", "Machine"), ("versions", "Versions")):
        value = info.get(key)
        if value:
            rows.append((label, _facts(value)))
    return (
        _table(["", ""], [[f"**{label}**", text] for label, text in rows])
        if rows
        else "Nothing is known of how it was run."
    )


def _facts(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {fact}" for name, fact in flatten(value).items() if fact not in (None, "", [], {}))
    return str(value)


def _cost_rules(results: dict[str, Any]) -> str:
    text = (
        "FLOPs are those of training, forward and backward; evaluations are not counted in them. The pretrained "
        "teacher's own training is charged to no arm. The meta model is charged in full to both arms that train "
        "modules in it, the pairs to their own arm."
    )
    seconds = {}
    for arm in MODULE_ARMS:
        cost = results["cost"]["arms"][arm]
        if cost["total"]["seconds"] and cost["preparation"]["seconds"]:
            in_turn, parallel = (
                cost["preparation"]["seconds"]["mean"],
                cost["preparation_in_parallel"]["seconds"]["mean"],
            )
            seconds[arm] = (cost["total"]["seconds"]["mean"], cost["total"]["seconds"]["mean"] - in_turn + parallel)
    if seconds:
        unit = time_unit(value for pair in seconds.values() for value in pair)
        listed = join_words(
            [f"{arm} {unit.text(short)} instead of {unit.text(long)}" for arm, (long, short) in seconds.items()]
        )
        text += f" With one machine per pair the critical path is: {listed}."
    return text


def _teacher_row(results: dict[str, Any], flops: Unit, seconds: Unit) -> list[str]:
    teachers = [run["teacher"] for run in results["cost"]["runs"] if run["teacher"]]
    steps = [run["steps"]["teacher"]["training_steps"] for run in results["cost"]["runs"] if run["teacher"]]
    spent = {q: sum(t[q] for t in teachers) / len(teachers) if teachers else None for q in ("flops", "seconds")}
    accuracy = results["accuracy"]["teacher"]
    return [
        "*teacher (not charged)*",
        _range_text(steps),
        flops.figure(spent["flops"]),
        seconds.figure(spent["seconds"]),
        MISSING,
        spread_text(accuracy["test_accuracy"]),
        spread_text(accuracy["ood_accuracy"]),
    ]


def _steps_text(results: dict[str, Any], arm: str) -> str:
    costs = [run["arms"][arm] for run in results["cost"]["runs"] if run["arms"][arm]]
    total = _range_text([cost["training_steps"]["total"] for cost in costs])
    if arm not in MODULE_ARMS:
        return total
    return f"{total} ({_range_text([cost['training_steps']['end_to_end'] for cost in costs])} end to end)"


def _range_text(counts: Sequence[int]) -> str:
    if not counts:
        return MISSING
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _cold_text(part: dict[str, Any]) -> str:
    cold = [part[f"cold_{stitches}_test_accuracy"] for stitches in ("kept", "folded", "dropped")]
    if not any(cold):
        return spread_text(part["cold_test_accuracy"])
    return " / ".join(spread_text(statistic) for statistic in cold)


def _unfinished_text(part: dict[str, Any]) -> str:
    if not part["curve"]:
        return "unfinished"
    last = part["curve"][-1]
    return f"unfinished ({last['mean']:.1f} at step {last['step']:,})"


def _hybrids_section(results: dict[str, Any]) -> str:
    rows = []
    for run in results["runs"]:
        for hybrid in results["accuracy"]["runs"][results["runs"].index(run)]["hybrids"]:
            rows.append(
                [
                    run["folder"],
                    str(hybrid["slot"]),
                    accuracy_text(hybrid["test_accuracy"]),
                    accuracy_text(hybrid["teacher_test_accuracy"]),
                    difference_text(hybrid["difference"]),
                ]
            )
    if not rows:
        return "The hybrids were not evaluated."
    heads = ["run", "slot", "hybrid accuracy (%)", "teacher accuracy (%)", "difference (points)"]
    meta = results["accuracy"]["meta"]["test_accuracy"]
    text = "The meta model with one slot taken by the teacher's module."
    if meta:
        text += f" The meta model alone: {spread_text(meta)} %."
    return f"{text}\n\n{_table(*_without_single(heads, rows))}"


def _pairs_section(results: dict[str, Any]) -> str:
    pairs = [
        (results["runs"][index]["folder"], arm, pair)
        for index, run in enumerate(results["accuracy"]["runs"])
        for arm in MODULE_ARMS[::-1]
        for pair in run["pairs"][arm]
    ]
    if not pairs:
        return "No pair was trained."
    terms = list(dict.fromkeys(name for _, _, pair in pairs for name in pair["terms"]))
    shares = list(dict.fromkeys(name for _, _, pair in pairs for name in pair["gradient_share"]))
    heads = ["run", "arm", "slot", "steps", "final loss", *(f"{term} term" for term in terms)]
    heads += [f"gradient share, {name} (%)" for name in shares]
    sides = [side for side in ("pre", "post") if any(side in pair["stitch_fit"] for _, _, pair in pairs)]
    heads += [f"variance explained by the fitted {side}-stitch (%)" for side in sides]
    heads.append("hybrid accuracy with the student module (%)")
    rows = []
    for folder, arm, pair in pairs:
        row = [
            folder,
            arm,
            str(pair["slot"]),
            f"{pair['training_steps']:,}{'' if pair['finished'] else ' (unfinished)'}",
        ]
        row += [_loss_text(pair["loss"]), *(_loss_text(pair["terms"].get(term)) for term in terms)]
        row += [_percent_text(pair["gradient_share"].get(name)) for name in shares]
        row += [_percent_text(pair["stitch_fit"].get(side)) for side in sides]
        rows.append([*row, accuracy_text(pair["test_accuracy"])])
    text = "Losses and gradient shares are means over the last tenth of the logged steps."
    return f"{text}\n\n{_table(*_without_single(heads, rows))}"


def _graph_section(results: dict[str, Any]) -> str | None:
    rows = []
    for run, accuracy in zip(results["runs"], results["accuracy"]["runs"], strict=True):
        for step, layers in accuracy["graph_density"].items():
            for layer in layers:
                row = [run["folder"], step, layer["layer"], f"{layer['receivers']} x {layer['senders']}"]
                for links, tiles in (("edges", "tiles"), ("probable_edges", "probable_tiles")):
                    row += [_percent_text(layer[links]), " / ".join(map(_percent_text, layer[tiles].values()))]
                rows.append([*row, str(layer["receivers_without_sender"])])
    if not rows:
        return None
    sizes = " / ".join(layer["tiles"])
    heads = ["run", "step", "layer", "receivers x senders", "links (%)", f"tiles of {sizes} with a link (%)"]
    heads += ["links of probability 1/2 (%)", "tiles with such a link (%)", "receivers without sender"]
    return _table(*_without_single(heads, rows))


def _throughput_section(results: dict[str, Any]) -> str | None:
    heads, rows = throughput_table(results)
    text = (
        "Images a second of training; utilisation is the median of the logged lines, of the device's peak for the "
        "precision; memory is the most that one process held (on a GPU: allocated there); left out were steps whose "
        "loss or gradient was not finite."
    )
    return f"{text}\n\n{_table(*_without_single(heads, rows))}" if rows else None


def _without_single(heads: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Drops the first column (the run) where all rows share it."""
    if len({row[0] for row in rows}) > 1:
        return heads, rows
    return heads[1:], [row[1:] for row in rows]


def _loss_text(value: float | None) -> str:
    return MISSING if value is None else significant(value)


def _percent_text(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f}"


def _config_section(config: dict[str, Any]) -> str:
    flat = flatten(config)
    if not flat:
        return "config.yaml is missing or empty."
    shown = list(flat.items())[:_LONGEST_CONFIG]
    text = _table(["key", "value"], [[f"`{key}`", f"`{_plain(value)}`"] for key, value in shown])
    left = len(flat) - len(shown)
    return text + (f"\n\n{left} more keys are in config.yaml." if left else "")


def _plain(value: object) -> str:
    exact = number(value)
    return f"{exact:g}" if isinstance(value, float) and exact is not None else str(value)


def _picture(name: str, pictures: dict[str, str]) -> str:
    return f"![{pictures[name]}]({name})"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in body
    )
