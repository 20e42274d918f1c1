"""Files of a run folder: written whole or not at all, read strictly, locked against a second launch."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m2mkd_fast.atomic import unwritable, write_text_atomically
from m2mkd_fast.errors import M2MKDError


def write_json(path: Path, value: Any) -> None:
    write_text_atomically(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise M2MKDError(f"{path} is damaged ({error}); delete its folder to make this step again") from error


@contextmanager
def exclusive(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold a folder for this process; the operating system lets go of it when the process ends, however it ends.

    Args:
        folder: made where it is missing.
        patience: seconds to wait for a process that holds it. A killed run's workers take a moment to notice.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise unwritable(folder, error) from error
    deadline = time.monotonic() + patience
    with lock as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise M2MKDError(
                        f"another process is working in {folder}; wait for it, or choose another folder with "
                        "output=FOLDER"
                    ) from error
                time.sleep(0.05)
        yield
