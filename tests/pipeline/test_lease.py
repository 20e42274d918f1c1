"""Leases: one owner at a time, whoever races, dies, is stopped or wakes up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.pipeline import lease as module
from m2mkd_fast.pipeline.lease import STALE_AFTER, LeaseLost, LeaseObserver, highest_number, hold, read_holder, take


class Clock:
    """Seconds that pass when the test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def foreign(folder: Path, number: int = 1, heartbeat: int = 0, **changes) -> None:
    """A holder on another machine, as its file looks from here."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"owner": "far:1:abcd", "host": "far", "machine": "another boot", "pid": 1, "started": 1, "interval": 5.0}
    facts |= {"number": number, "heartbeat": heartbeat, "state": "held"} | changes
    (folder / f"{number}.json").write_text(json.dumps(facts))


def test_one_holder_at_a_time_and_numbers_that_only_go_up(tmp_path):
    folder = tmp_path / "lease"
    first = LeaseObserver(folder).acquire()
    assert first.number == 1 and read_holder(folder).pid == os.getpid()
    assert LeaseObserver(folder).holder().owner == read_holder(folder).owner
    assert LeaseObserver(folder).acquire() is None
    first.check()
    first.release()
    assert LeaseObserver(folder).holder() is None
    with LeaseObserver(folder).acquire() as second:
        assert second.number == 2
        assert [path.name for path in folder.iterdir()] == ["2.json"]
    assert read_holder(folder).state == "released"


def test_a_number_that_was_left_behind_is_not_taken(tmp_path):
    """Two saw lease 1 released; one took 2, gave it back, and 3 was taken before the other came to create 2."""
    folder = tmp_path / "lease"
    LeaseObserver(folder).acquire().release()
    LeaseObserver(folder).acquire().release()
    with LeaseObserver(folder).acquire() as third:
        assert take(folder, after=1) is None
        third.check()
        assert [path.name for path in folder.iterdir()] == ["3.json"]


def test_an_owner_elsewhere_is_dead_when_its_counter_stands_still_on_the_observers_clock(tmp_path):
    folder, clock = tmp_path / "lease", Clock()
    observer = LeaseObserver(folder, clock)
    for heartbeat in range(20):  # alive, however long it takes
        foreign(folder, heartbeat=heartbeat)
        assert observer.holder().host == "far"
        clock.now += 5.0
    for _ in range(STALE_AFTER - 1):
        assert observer.holder() is not None
        clock.now += 5.0
    lease = observer.acquire()
    assert lease.number == 2
    lease.release()


def test_wall_clocks_do_not_matter(tmp_path, monkeypatch):
    """Neither a file's time nor the time of day is looked at: both jump by a year in each direction."""
    folder, clock = tmp_path / "lease", Clock()
    foreign(folder)
    observer = LeaseObserver(folder, clock)
    for jump in (-3e7, 3e7):
        monkeypatch.setattr(time, "time", lambda jump=jump: 1e9 + jump)
        os.utime(folder / "1.json", (1e9 - jump, 1e9 - jump))
        assert observer.holder() is not None


def test_an_observer_that_slept_has_seen_nothing_meanwhile(tmp_path):
    folder, clock = tmp_path / "lease", Clock()
    foreign(folder)
    observer = LeaseObserver(folder, clock)
    assert observer.holder() is not None
    clock.now += 3600.0
    assert observer.holder() is not None
    foreign(folder, heartbeat=1)  # the owner was asleep as well
    assert observer.holder() is not None


def test_a_process_of_this_machine_that_is_gone_is_dead_at_once(tmp_path):
    folder = tmp_path / "lease"
    code = "import sys, os; from pathlib import Path; from m2mkd_fast.pipeline.lease import take\n"
    code += "take(Path(sys.argv[1]), 0); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(folder)]).returncode == -signal.SIGKILL
    assert read_holder(folder).state == "held"
    with LeaseObserver(folder).acquire() as lease:
        assert lease.number == 2
    # A later process with the same number is another process.
    ours = LeaseObserver(folder).acquire()
    holder = read_holder(folder)
    ours.release()
    (folder / f"{holder.number}.json").write_text(json.dumps(asdict(replace(holder, started=holder.started - 1))))
    assert LeaseObserver(folder).holder() is None


def test_who_was_taken_over_may_not_write(tmp_path):
    folder = tmp_path / "lease"
    lease = LeaseObserver(folder).acquire(interval=0.01)
    foreign(folder, number=lease.number + 1)
    with pytest.raises(LeaseLost, match="no longer holds"):
        lease.check()
    lease.release()
    assert read_holder(folder).host == "far" and read_holder(folder).state == "held"


def test_a_deleted_folder_is_a_lost_lease(tmp_path):
    folder = tmp_path / "lease"
    lease = LeaseObserver(folder).acquire()
    foreign(folder, number=1)  # deleted by hand, and taken anew by another: the number alone tells nothing
    with pytest.raises(LeaseLost):
        lease.check()
    (folder / "1.json").unlink()
    with pytest.raises(LeaseLost):
        lease.check()
    lease.release()
    assert highest_number(folder) == 0


def test_a_file_cut_off_by_a_power_cut_goes_stale(tmp_path):
    folder, clock = tmp_path / "lease", Clock()
    folder.mkdir()
    (folder / "4.json").write_text('{"number": 4, "ow')
    observer = LeaseObserver(folder, clock)
    assert observer.holder().owner == "unknown"
    for _ in range(STALE_AFTER):
        clock.now += module.INTERVAL
        observer.holder()
    with observer.acquire() as lease:
        assert lease.number == 5


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(M2MKDError, match="cannot write .*file/lease/1.json"):
        LeaseObserver(tmp_path / "file" / "lease").acquire()


def test_threads_that_race_never_hold_it_together(tmp_path):
    folder, holding, most, taken = tmp_path / "lease", [], [], []

    def race() -> None:
        while len(taken) < 60:
            observer = LeaseObserver(folder)
            lease = observer.acquire()
            if lease is not None:
                holding.append(lease.number)
                most.append(len(holding))
                taken.append(lease.number)
                lease.check()
                holding.remove(lease.number)
                lease.release()

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert sorted(set(taken)) == sorted(taken) and max(taken) >= 60


RACER = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from m2mkd_fast.pipeline.lease import LeaseLost, LeaseObserver, take, highest_number
    folder, diary = Path(sys.argv[1]), Path(sys.argv[2])
    # All abandoned leases are fair game: nobody looks whether the holder lives.
    end = time.monotonic() + 60
    while (n := highest_number(folder)) < 300 and time.monotonic() < end:
        lease = take(folder, n)
        if lease is not None:
            with diary.open("a") as file:
                file.write(f"{lease.number}\\n")
    """
)


def test_two_processes_that_see_the_same_dead_owner_never_both_win(tmp_path):
    command = [sys.executable, "-c", RACER, str(tmp_path / "lease")]
    racers = [subprocess.Popen([*command, str(tmp_path / f"{name}.txt")]) for name in "ab"]
    assert [racer.wait(timeout=60) for racer in racers] == [0, 0]
    won = [[int(line) for line in (tmp_path / f"{name}.txt").read_text().split()] for name in "ab"]
    # A number may have no winner: the other was created on top of it at once.
    assert len(won[0]) + len(won[1]) == len({*won[0], *won[1]}) > 150


OWNER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from m2mkd_fast.pipeline.lease import LeaseLost, LeaseObserver
    lease = LeaseObserver(Path(sys.argv[1])).acquire(interval=0.05)
    while True:
        try:
            lease.check()
        except LeaseLost:
            sys.exit(7)
        Path(sys.argv[2]).write_text("owner")
        time.sleep(0.1)
    """
)


def test_an_owner_that_was_stopped_and_wakes_after_a_takeover_does_not_write(tmp_path):
    folder, target = tmp_path / "lease", tmp_path / "written"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(folder), str(target)])
    try:
        while not target.exists():
            time.sleep(0.01)
        time.sleep(0.03)  # it has written, and sleeps
        owner.send_signal(signal.SIGSTOP)
        observer = LeaseObserver(folder)
        assert observer.holder() is not None
        while (lease := observer.acquire(interval=0.05)) is None:
            time.sleep(0.02)
        target.write_text("taken over")
        owner.send_signal(signal.SIGCONT)
        assert owner.wait(timeout=30) == 7
        assert target.read_text() == "taken over"
        lease.check()
        lease.release()
    finally:
        owner.kill()
        owner.wait()


def test_who_comes_second_waits(tmp_path):
    folder, order = tmp_path / "lease", []

    def second() -> None:
        with hold(folder, poll=0.001):
            order.append("second")

    with hold(folder):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_an_error_in_the_block_is_not_hidden_by_a_lease_that_cannot_be_released(tmp_path, monkeypatch):
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    leases = [LeaseObserver(tmp_path / name).acquire() for name in "ab"]
    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(M2MKDError, match="the step's own"), leases[0]:
        raise M2MKDError("the step's own")
    with pytest.raises(M2MKDError, match=r"cannot write .*b/1.json: .*No space left"), leases[1]:
        assert leases[1].number == 1
