"""Files of a run folder: written whole or not at all, read strictly, locked against a second launch."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m2mkd_fast.errors import M2MKDError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place in one step.

    A reader, and a run that is killed at any moment, sees the old file or the new one, never a part of either.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise M2MKDError(
                f"no space to write {path} ({error.strerror}); what the run folder already holds is intact: free some "
                "space and start the same command again, it goes on from there"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise M2MKDError(f"{path} is damaged ({error}); delete its folder to make this step again") from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the operating system lets go of it when the process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise M2MKDError(
                f"another process is working in {folder}; wait for it, or choose another folder with output=FOLDER"
            ) from error
        yield


class MetricsFile:
    """``metrics.jsonl`` of a step: one JSON object a line, in the order of the steps."""

    def __init__(self, path: Path, keep_until: int) -> None:
        """Open for appending; lines after step ``keep_until`` belong to work that was lost, and go."""
        self.path = path
        kept = []
        if path.exists():
            for line in path.read_text(errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    break  # the process was killed in the middle of this line
                if entry["step"] <= keep_until:
                    kept.append(line)
        text = "".join(line + "\n" for line in kept)
        write_atomically(path, lambda temporary: temporary.write_text(text))

    def append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
