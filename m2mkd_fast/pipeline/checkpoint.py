"""Checkpoints of one step of a run: whole or not there, sealed by a hash, the last few of them kept."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from m2mkd_fast.atomic import write_atomically, write_text_atomically
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.state import own_memory
from m2mkd_fast.pipeline.files import sha256_of_file

_NAME = re.compile(r"(?P<step>\d{8,})\.(?:safetensors|json)")


class Checkpoints:
    """The checkpoints in a folder: ``<step>.safetensors`` with the tensors, ``<step>.json`` with the facts and seals.

    The JSON file is written last and holds the size and SHA-256 of the tensor file, and a SHA-256 of itself: without
    it, or where one bit of either file is not as it was written, a checkpoint counts as damaged and the one before it
    is taken. Hashing reads a file once more when it is written (from the page cache) and once when it is loaded.

    Args:
        folder: where they are; made when the first one is saved. One process at a time may write into it.
        keep: how many of them stay.
        say: takes the one line that says which are damaged and what happens instead; a warning where there is none.

    Raises:
        M2MKDError: ``keep`` is less than 1.
    """

    def __init__(self, folder: Path, keep: int = 2, say: Callable[[str], None] | None = None) -> None:
        if keep < 1:
            raise M2MKDError(f"keep={keep} checkpoints: at least 1 has to stay, or there is nothing to go on from")
        self.folder, self.keep = folder, keep
        self.say = say or (lambda line: warnings.warn(line, stacklevel=3))

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        """Write the checkpoint of ``step``, then remove what is older than the last ``keep``.

        Args:
            step: training steps that are done, 0 or more.
            tensors: of any device and type; each is written whole, views included.
            facts: whatever else is to come back, as JSON.

        Raises:
            M2MKDError: a file cannot be written (a full disk, say); earlier checkpoints are intact.
        """
        path = self._path(step, "safetensors")
        digest = ""

        def write(temporary: Path) -> None:
            nonlocal digest
            save_file(own_memory({name: tensor.detach() for name, tensor in tensors.items()}), temporary)
            digest = sha256_of_file(temporary)

        write_atomically(path, write)
        entry = {"step": step, "bytes": path.stat().st_size, "sha256": digest, "facts": facts}
        write_text_atomically(self._path(step, "json"), _sealed(entry))
        self._remove_all_but(step)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors (on the CPU) and facts of the newest intact checkpoint; None where there is none.

        Damaged ones are passed over, with one line that names them and what happens instead.
        """
        damaged = []
        for step in sorted(self._steps(), reverse=True):
            try:
                content = self._read(step)
            except (_Damaged, OSError) as error:
                damaged.append(str(error))
                continue
            if damaged:
                self.say(f"{'; '.join(damaged)}; going on from the checkpoint of step {step}")
            return content
        if damaged:
            self.say(f"{'; '.join(damaged)}; no intact checkpoint is left, so training starts over from step 0")
        return None

    def clear(self) -> None:
        """Remove all checkpoints and the folder, if it is there."""
        if self.folder.is_dir():
            for path in self._ours():
                path.unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _path(self, step: int, kind: str) -> Path:
        return self.folder / f"{step:08d}.{kind}"

    def _ours(self) -> list[Path]:
        """Files of checkpoints, and what a process that was killed while it wrote one has left."""
        names = re.compile(rf"{_NAME.pattern}|\.{_NAME.pattern.replace('?P<step>', '?:')}\.\d+\.partial")
        return [path for path in self.folder.iterdir() if names.fullmatch(path.name)]

    def _steps(self) -> set[int]:
        if not self.folder.is_dir():
            return set()
        return {int(match["step"]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))}

    def _read(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        record, path = self._path(step, "json"), self._path(step, "safetensors")
        if not record.exists():
            raise _Damaged(f"{path} is not complete ({record.name} is missing: the process was stopped in between)")
        entry = _unsealed(record)
        if entry is None or entry["step"] != step:
            raise _Damaged(f"{record} is damaged (it is not what was written)")
        if not path.exists():
            raise _Damaged(f"{path} is missing")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise _Damaged(f"{path} is damaged ({size} bytes of {entry['bytes']})")
        if sha256_of_file(path) != entry["sha256"]:
            raise _Damaged(f"{path} is damaged (its SHA-256 is not the one in {record.name})")
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, entry["facts"]  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise _Damaged(f"{path} cannot be read ({error})") from error

    def _remove_all_but(self, last: int) -> None:
        """Keep ``last`` and those before it; what is newer is damaged, or was left by a run that was passed over."""
        kept = sorted(step for step in self._steps() if step <= last)[-self.keep :]
        names = {self._path(step, kind).name for step in kept for kind in ("safetensors", "json")}
        for path in sorted(self._ours()):  # .json before .safetensors: what is half removed does not look whole
            if path.name not in names:
                path.unlink(missing_ok=True)


class _Damaged(Exception):
    """A checkpoint that cannot be used; the message names the file and says why."""


def _sealed(entry: dict[str, Any]) -> str:
    """The entry as JSON text whose first key is the SHA-256 of the text without it."""
    text = json.dumps(entry, indent=2)
    return json.dumps({"seal": hashlib.sha256(text.encode()).hexdigest()} | entry, indent=2) + "\n"


def _unsealed(path: Path) -> dict[str, Any] | None:
    """What :func:`_sealed` was given, if the file holds its result to the last byte."""
    text = path.read_bytes()
    try:
        entry = json.loads(text)
        del entry["seal"]
        return entry if _sealed(entry).encode() == text else None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        return None
