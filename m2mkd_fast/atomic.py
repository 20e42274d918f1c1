"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from m2mkd_fast.errors import M2MKDError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk, then put it in place in one step.

    A reader, and a run that is killed at any moment, sees the old file or the new one, never a part of either.

    Raises:
        M2MKDError: the file cannot be written (a full disk, say); what was there before is intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error
    finally:
        if temporary.exists():
            temporary.unlink()


def unwritable(path: Path, error: Exception) -> M2MKDError:
    """The error for a file that cannot be written."""
    return M2MKDError(
        f"cannot write {path}: {error}. What was there before is intact: make room, or make the folder writable, and "
        "start the same command again"
    )


def write_text_atomically(path: Path, text: str) -> None:
    """:func:`write_atomically` for text in UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _sync_folder(folder: Path) -> None:
    """Make the rename last through a power cut, where the system can open a folder for that (POSIX)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
