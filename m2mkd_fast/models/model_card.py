"""The model card of a saved model: what anyone who finds the folder wants to know first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Provenance that has a place of its own on the card; the rest is listed under "More".
_PLACED = ("data", "results", "config", "commit", "title")


def model_card(config: Mapping[str, Any]) -> str:
    """Markdown for the `README.md` of a saved model, from what its `config.json` holds.

    The front matter names library, task and tags as the Hugging Face Hub reads them.
    """
    provenance = config["provenance"]
    name = config["model"]["name"]
    lines = [
        "---",
        "library_name: m2mkd_fast",
        "pipeline_tag: image-classification",
        "tags:",
        "- m2mkd_fast",
        "- image-classification",
        "---",
        "",
        f"# {provenance.get('title', name)}",
        "",
        f"`{name}`, {config['parameters']:,} parameters, saved with m2mkd_fast {config['library_version']}.",
        "",
        "```python",
        "import m2mkd_fast",
        "",
        'model = m2mkd_fast.create_model("local-dir:FOLDER")  # or "hf-hub:OWNER/NAME"',
        "```",
        "",
    ]
    if provenance.get("data") is not None:
        lines += ["## Data", "", _sentence(provenance["data"]), ""]
    if provenance.get("results"):
        lines += ["## Results", "", "| | |", "|---|---|"]
        lines += [f"| {key.replace('_', ' ')} | {_number(value)} |" for key, value in provenance["results"].items()]
        lines.append("")
    lines += ["## Model", "", *_json(config["model"])]
    if provenance.get("config"):
        lines += ["## Configuration of the run", "", *_json(provenance["config"])]
    lines += ["## Provenance", ""]
    if provenance.get("commit"):
        lines.append(f"- commit of m2mkd_fast: `{provenance['commit']}`")
    if config["started_from"]:
        lines.append(f"- started from the weights of `{config['started_from']}`")
    lines.append(f"- SHA-256 of the weights: `{config['weights_hash']}`")
    lines += [f"- {key}: {_sentence(value)}" for key, value in provenance.items() if key not in _PLACED]
    return "\n".join(lines) + "\n"


def _sentence(value: Any) -> str:
    return value if isinstance(value, str) else f"`{json.dumps(value)}`"


def _number(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else _sentence(value)


def _json(value: Any) -> list[str]:
    return ["```json", json.dumps(value, indent=2), "```", ""]
