"""Files of a run folder: written whole or not at all, read strictly."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m2mkd_fast.atomic import write_text_atomically
from m2mkd_fast.errors import M2MKDError

_CHUNK = 1 << 20  # bytes read at once for a hash


def write_json(path: Path, value: Any) -> None:
    write_text_atomically(path, json.dumps(value, indent=2) + "\n")


def sha256_of_file(path: Path) -> str:
    """SHA-256, in hex, of a file's bytes."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise M2MKDError(f"{path} is damaged ({error}); delete its folder to make this step again") from error


class Failure:
    """``failure.json`` of a step: why its last attempt failed, {error, final, host, time, attempts}.

    A final failure is one that the next attempt would only repeat. The file goes when the step is begun again; attempts
    are counted on.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "failure.json"
        self._attempts = self._read_attempts()

    def read(self) -> dict[str, Any] | None:
        """What the file says, or None where no attempt has failed."""
        try:
            return read_json(self.path)
        except FileNotFoundError:
            return None

    def begin(self) -> None:
        """A new attempt begins."""
        self._attempts = self._read_attempts()
        self.path.unlink(missing_ok=True)

    def record(self, error: str, final: bool, say: Callable[[str], None]) -> None:
        """An attempt failed; where even that cannot be written (a full disk, say), it is said."""
        self._attempts += 1
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        facts = {"error": error, "final": final, "host": socket.gethostname(), "time": now, "attempts": self._attempts}
        try:
            write_json(self.path, facts)
        except M2MKDError as full:
            say(str(full))

    def _read_attempts(self) -> int:
        return (self.read() or {"attempts": 0})["attempts"]
