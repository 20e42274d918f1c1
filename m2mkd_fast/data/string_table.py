"""Many strings in one piece of memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from torch import Tensor


class StringTable(Sequence):
    """Strings in a single array of bytes, in place of a list of objects.

    A list of a million file names is copied page by page into every worker process, since reading a string writes its
    reference count; this is shared between them, and takes about half the memory.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self.ends = np.cumsum([len(part) for part in encoded], dtype=np.int64)
        self.content = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"string {index} of {len(self)}")
        index %= len(self)
        start = self.ends[index - 1] if index else 0
        return self.content[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def subset(self, indices: Tensor) -> StringTable:
        """The strings of `indices`, in that order."""
        return StringTable(self[index] for index in indices.tolist())
