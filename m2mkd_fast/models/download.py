"""A repository of the Hugging Face Hub as a local folder, known by its commit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from m2mkd_fast.errors import M2MKDError, UnknownNameError

_log = logging.getLogger("m2mkd_fast")
SAFE = (".safetensors", ".npz")
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")


def download(repository: str, revision: str | None = None, inside: str = "") -> tuple[Path, str]:
    """Fetch the configuration and the weights of a repository, or take them from the cache.

    Only what a model is read from is fetched: `config.json`, and `model.safetensors` or else the one file of weights
    that is there; with `inside`, what it names alone. Where the hub cannot be reached, the copy in the cache is taken,
    with a warning that says its commit.

    Args:
        repository: `owner/name`.
        revision: a branch, a tag or a commit; the main branch by default.
        inside: a file of the repository, or a folder in it.

    Returns:
        The folder of the repository, and the commit that it holds.

    Raises:
        M2MKDError: no such repository, revision or file, no access to it, no weights in it; or the hub cannot be
            reached and the cache has no copy.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import (
            HFValidationError,
            HTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise M2MKDError(f"hf-hub:{repository} needs huggingface_hub ({error}); pip install huggingface_hub") from error
    what = f"hf-hub:{repository}" + (f"/{inside}" if inside else "") + (f"@{revision}" if revision else "")
    try:
        facts = HfApi().model_info(repository, revision=revision, timeout=30)
        files = _wanted_files([file.rfilename for file in facts.siblings or ()], what, inside)
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=files))
    except HFValidationError as error:
        raise M2MKDError(f"{what} is no name of a repository ({error}); write hf-hub:owner/name") from error
    except RepositoryNotFoundError as error:  # also what a gated or private one answers
        raise M2MKDError(
            f"{what}: there is no such repository, or you may not read it; check the spelling, and log in with "
            "`hf auth login` for a private or gated one"
        ) from error
    except RevisionNotFoundError as error:
        raise M2MKDError(
            f"{what}: the repository has no such revision; give a branch, a tag or a whole commit"
        ) from error
    except (HTTPError, OSError) as error:
        return _cached(repository, revision, inside, what, error)
    return folder, folder.name


def weights_among(names: Sequence[str], what: str) -> list[str]:
    """The files of weights that a model may be read from; M2MKDError where there are none.

    Files that no pickle is needed for come before those that are pickles.
    """
    if "model.safetensors" in names:
        return ["model.safetensors"]
    safe = [name for name in names if name.endswith(SAFE)]
    weights = safe or [name for name in names if name.endswith(PICKLES)]
    if not weights:
        raise M2MKDError(f"{what} has no weights; it holds {', '.join(sorted(names)) or 'no files'}")
    return weights


def _wanted_files(names: Sequence[str], what: str, inside: str) -> list[str]:
    if inside:
        files = [name for name in names if name == inside or name.startswith(f"{inside}/")]
        if not files:
            raise UnknownNameError("file of the repository", inside, names, f"It is looked for in {what}.")
        return files
    weights = weights_among(names, what)
    if len(weights) > 1:
        raise M2MKDError(
            f"{what} has several files of weights ({', '.join(sorted(weights))}), of which one model cannot be read; "
            f"name the one you mean, for example hf-hub:OWNER/NAME/{min(weights)}"
        )
    return [*weights, *(name for name in names if name == "config.json")]


def _cached(repository: str, revision: str | None, inside: str, what: str, reason: Exception) -> tuple[Path, str]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    summary = str(reason).strip().split("\n")[0] or type(reason).__name__
    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        repositories = frozenset()
    for cached in repositories:
        if cached.repo_type != "model" or cached.repo_id != repository:
            continue
        for copy in cached.revisions:
            wanted = (revision or "main") in copy.refs or copy.commit_hash == revision
            if wanted and (copy.snapshot_path / inside).exists():
                _log.warning(
                    "%s: the hub cannot be reached (%s); using the cached copy of commit %s, which may be old",
                    what,
                    summary,
                    copy.commit_hash,
                )
                return copy.snapshot_path, copy.commit_hash
    raise M2MKDError(
        f"{what}: the hub cannot be reached ({summary}) and the cache has no copy of it; try again later, or give a "
        "folder with local-dir:FOLDER"
    ) from reason
