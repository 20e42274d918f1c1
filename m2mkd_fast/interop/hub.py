"""Share a model on the Hugging Face Hub, with what is known of the run that made it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.pretrained import save_pretrained


def push_to_hub(
    model: nn.Module,
    repository: str,
    *,
    private: bool | None = None,
    message: str = "Upload model",
    dry_run: str | os.PathLike[str] | None = None,
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> str:
    """Save a model as `save_pretrained` does and upload the folder; `create_model("hf-hub:OWNER/NAME")` reads it again.

    Args:
        model, name, options, provenance: as in :func:`m2mkd_fast.models.pretrained.save_pretrained`;
            :func:`run_provenance` reads the last from a run folder.
        repository: `owner/name`; it is made where it does not exist.
        private: whether a new repository is private; the hub's default for the owner if not given.
        message: of the commit.
        dry_run: a folder: what would be uploaded is written there, and nothing is sent.

    Returns:
        The commit's hash; in a dry run the folder.

    Raises:
        M2MKDError: the model cannot be saved (see `save_pretrained`), the hub cannot be reached, or it refuses.
    """
    arguments = {"name": name, "options": options, "provenance": provenance}
    if dry_run is not None:
        return str(save_pretrained(model, dry_run, **arguments))
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError, HTTPError
    except ImportError as error:
        raise M2MKDError(f"push_to_hub needs huggingface_hub ({error}); pip install huggingface_hub") from error
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, **arguments)
        try:
            api = HfApi()
            api.create_repo(repository, private=private, exist_ok=True)
            return api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message).oid
        except HFValidationError as error:
            raise M2MKDError(f"{repository!r} is no name of a repository ({error}); write owner/name") from error
        except (HTTPError, OSError) as error:
            raise M2MKDError(
                f"the upload to {repository} failed: {error}. Log in with `hf auth login` with a token that may write, "
                "check the owner's name, or look at what would be sent with a dry run"
            ) from error


def run_provenance(folder: str | os.PathLike[str], step: str) -> dict[str, Any]:
    """What a run folder says about the model that one of its steps made, as `provenance` for the model card.

    Raises:
        M2MKDError: the step is not finished, or one of the folder's files is missing or damaged.
    """
    import yaml

    folder = Path(folder)
    result = _read(folder / "steps" / step / "result.json", json.loads)
    config = _read(folder / "config.yaml", yaml.safe_load)
    run = _read(folder / "run.json", json.loads)
    metrics = {key: value for key, value in result["metrics"].items() if isinstance(value, int | float)}
    return {
        "title": f"{config['name']}: {step}",
        "data": config["data"]["spec"],
        "results": metrics,
        "config": config,
        "commit": run.get("commit"),
        "step": step,
        "seed": config["seed"],
        "training steps of this step": result["steps"],
        "versions": run.get("versions"),
        "machine": run.get("machine"),
    }


def _read(path: Path, parse: Any) -> dict[str, Any]:
    if not path.is_file():
        raise M2MKDError(f"there is no file {path}; give a run folder and a step that is finished in it")
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise M2MKDError(f"{path} is damaged ({error}); make the step again") from error
    if not isinstance(value, dict):
        raise M2MKDError(f"{path} is damaged: it holds a {type(value).__name__}; make the step again")
    return value
