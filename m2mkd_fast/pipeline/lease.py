"""Who works on a step: a lease with an owner and a heartbeat, held in files that several machines share.

A lease is a folder of files ``<N>.json``; the one with the highest number counts. To take it is to create the next
number, which only one process can do, and numbers never go back: of two that find the same lease abandoned one wins.
The owner raises a counter in his file every few seconds. No clocks of two machines are ever compared: an observer
counts on its own clock how long it has seen the same counter.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from m2mkd_fast.atomic import unwritable
from m2mkd_fast.errors import M2MKDError

INTERVAL = 5.0  # seconds between two heartbeats
STALE_AFTER = 6  # intervals without a heartbeat after which an owner counts as dead


class LeaseLost(M2MKDError):
    """Another process has taken the step over; nothing of it may be written here any more."""


@dataclass(frozen=True)
class Holder:
    """What a lease's file says.

    Attributes:
        number: the file's; later holders have higher ones.
        owner: a name that no other holder has, ``host:pid:random``.
        host: for messages.
        machine: boot and process namespace in which `pid` means something; empty where the system does not tell.
        pid: of the owner.
        started: of the owner's process, in ticks since the boot: a number that a later process with the same pid
            does not have.
        heartbeat: counter that goes up while the owner lives.
        interval: seconds between two heartbeats.
        state: "held" or "released".
    """

    number: int
    owner: str
    host: str
    machine: str
    pid: int
    started: int
    heartbeat: int
    interval: float
    state: str


class Lease:
    """A lease that this process holds, with the thread that keeps it; :meth:`LeaseObserver.acquire` makes it.

    As a context manager it is released at the end of the block.
    """

    def __init__(self, folder: Path, holder: Holder) -> None:
        self.folder, self._holder = folder, holder
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease {folder}", daemon=True)
        self._thread.start()

    @property
    def number(self) -> int:
        return self._holder.number

    def check(self) -> None:
        """Call before anything is written.

        A process that is suspended between this and its writing can still write once, a file that is whole: what two
        processes make of one step has the same bits, and the hash in the step's result tells where it has not.

        Raises:
            LeaseLost: another process has taken the lease, because this one seemed to be dead (stopped or suspended for
                long, or cut off from the disk), or the lease's folder was deleted.
            M2MKDError: the lease cannot be kept up (a full disk, say).
        """
        try:
            # A heartbeat of one's own also makes a network file system show what other machines have written.
            kept = self._beat() and self._is_ours()
        except OSError as error:
            raise unwritable(_path(self.folder, self.number), error) from error
        if not kept:
            raise LeaseLost(
                f"this process (lease {self.number}) no longer holds {self.folder}: another one took it over, or the "
                "folder was deleted. Nothing more is written from here; start the same command again to take part"
            )

    def release(self) -> None:
        """Let others have it at once; without effect where it was lost."""
        self._ended.set()
        self._thread.join()
        try:
            self._beat(state="released")
        except OSError as error:
            raise unwritable(_path(self.folder, self.number), error) from error

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.release()
        except M2MKDError:
            # What went wrong in the block says more, and without a heartbeat others can soon take the lease.
            if error is None:
                raise

    def _keep(self) -> None:
        while not self._ended.wait(self._holder.interval):
            try:
                if not self._beat():
                    return
            except OSError:
                continue  # tried again at the next heartbeat; for good, it is an error of the next check

    def _beat(self, state: str = "held") -> bool:
        """Raise the counter; False, and nothing is written, where the lease is no longer ours."""
        with self._lock:
            if not self._is_ours():
                return False
            self._holder = replace(self._holder, heartbeat=self._holder.heartbeat + 1, state=state)
            temporary = _write_temporary(self.folder, self._holder)
            try:
                os.replace(temporary, _path(self.folder, self.number))
            except FileNotFoundError:
                return False  # only who takes the lease tidies up
            _remove_below(self.folder, self.number)
            return True

    def _is_ours(self) -> bool:
        holder = read_holder(self.folder)
        return holder is not None and (holder.number, holder.owner) == (self.number, self._holder.owner)


class LeaseObserver:
    """What one process sees of a lease over time: only who looks several times can tell that an owner is dead.

    Args:
        folder: the lease's, ``steps/<name>/lease``.
        clock: seconds that only go up.

    Attributes:
        number: of the lease that :meth:`holder` looked at last; 0 where there was none.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self._clock = folder, clock
        self.number = 0
        self._seen: tuple[int, str, int] | None = None
        self._looked = self._silent = 0.0

    def holder(self) -> Holder | None:
        """The live holder, or None where the lease can be taken.

        A holder is dead if its heartbeat has not changed for `STALE_AFTER` of its intervals on this observer's clock,
        or at once if it is a process of this machine that is gone. One look counts for at most one interval: an
        observer that was suspended itself has seen nothing meanwhile.
        """
        holder = read_holder(self.folder)
        self.number = 0 if holder is None else holder.number
        if holder is None or holder.state == "released":
            return None
        now, beat = self._clock(), (holder.number, holder.owner, holder.heartbeat)
        if beat == self._seen:
            self._silent += min(now - self._looked, holder.interval)
        else:
            self._seen, self._silent = beat, 0.0
        self._looked = now
        return None if self._silent >= STALE_AFTER * holder.interval or _is_gone(holder) else holder

    def acquire(self, interval: float = INTERVAL) -> Lease | None:
        """Take the lease; None where somebody holds it or was faster.

        Raises:
            M2MKDError: the folder cannot be written.
        """
        return take(self.folder, self.number, interval) if self.holder() is None else None


def take(folder: Path, after: int, interval: float = INTERVAL) -> Lease | None:
    """Take a lease whose number `after` an observer found released or abandoned; None where somebody was faster.

    `after` is 0 where nobody has held it yet. One process may observe, and another one take it.

    Raises:
        M2MKDError: the folder cannot be written.
    """
    number = after + 1
    owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    started = _started(os.getpid()) or 0
    holder = Holder(number, owner, socket.gethostname(), _machine(), os.getpid(), started, 0, interval, "held")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = _write_temporary(folder, holder)
        try:
            won = _link(temporary, _path(folder, number))
        except FileNotFoundError:
            won = False  # who was faster has tidied up
        finally:
            temporary.unlink(missing_ok=True)
        if not won:
            return None
        # Whoever was slow may have created a number that later holders had left behind.
        if highest_number(folder) > number:
            _path(folder, number).unlink(missing_ok=True)
            return None
        _remove_below(folder, number)
        for rest in folder.glob(".*.partial"):  # of processes that were killed, or that come too late now
            rest.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(_path(folder, number), error) from error
    return Lease(folder, holder)


@contextmanager
def hold(folder: Path, poll: float = 0.05) -> Iterator[Lease]:
    """Hold a lease for a block, after waiting for whoever holds it now."""
    observer = LeaseObserver(folder)
    while (lease := observer.acquire()) is None:
        time.sleep(poll)
    with lease:
        yield lease


def read_holder(folder: Path) -> Holder | None:
    """What the file with the highest number says; None where there is none."""
    while (number := highest_number(folder)) > 0:
        try:
            return Holder(**{**json.loads(_path(folder, number).read_text()), "number": number})
        except FileNotFoundError:
            continue  # a later holder removed it just now
        except (UnicodeDecodeError, ValueError, TypeError):
            # Cut off by a power cut: nobody raises its counter, so it goes stale.
            return Holder(number, "unknown", "unknown", "", 0, 0, -1, INTERVAL, "held")
    return None


def highest_number(folder: Path) -> int:
    """0 where nobody has held the lease yet."""
    return max(_numbers(folder), default=0)


def _numbers(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []  # to take it makes the folder, or says why that cannot be
    stems = [name.removesuffix(".json") for name in names if name.endswith(".json")]
    return [int(stem) for stem in stems if stem.isdecimal()]


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number}.json"


def _write_temporary(folder: Path, holder: Holder) -> Path:
    temporary = folder / f".{holder.owner.replace('/', '_')}.partial"
    try:
        temporary.write_text(json.dumps(asdict(holder)))
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _link(temporary: Path, path: Path) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        # A network file system may repeat a request whose answer was lost, and find its own link.
        return os.stat(temporary).st_nlink > 1
    return True


def _remove_below(folder: Path, number: int) -> None:
    for lower in _numbers(folder):
        if lower < number:
            _path(folder, lower).unlink(missing_ok=True)


def _is_gone(holder: Holder) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    return bool(holder.machine) and holder.machine == _machine() and _started(holder.pid) != holder.started


@functools.cache
def _machine() -> str:
    """Where a process number means one process: this boot of this machine, and the container's process namespace."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """When a process was started, in ticks since the boot; None where it is gone or only waits to be collected."""
    try:
        # The name of the program stands in parentheses and may itself contain blanks and parentheses.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])
