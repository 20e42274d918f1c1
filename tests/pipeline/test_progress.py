from __future__ import annotations

import io
import json
import queue
import re
import threading
import time

import pytest
from rich.console import Console

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.pipeline.progress import ProgressDisplay, QueueProgress, duration


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(clock: Clock | None = None, interval: float = 10.0) -> tuple[ProgressDisplay, io.StringIO]:
    output = io.StringIO()
    console = Console(file=output, force_terminal=False, width=60)
    return ProgressDisplay(console, interval, clock or Clock()), output


def test_plain_lines_come_at_start_and_end_and_once_per_interval() -> None:
    clock = Clock()
    display, output = plain(clock)
    with display:
        display.start("m2mkd/pair0", 1000)
        for done in range(1, 31):
            clock.now += 1.0
            display.update("m2mkd/pair0", done * 10, loss=1.5, terms={"task": 1.0, "distillation": 0.5})
        display.finish("m2mkd/pair0", "hybrid accuracy 81.2 %")
    assert output.getvalue().splitlines() == [
        "m2mkd/pair0: starts, 1,000 steps",
        "m2mkd/pair0: 100/1,000 (10 %), loss 1.5 (task 1 + distillation 0.5), 1:30 left",
        "m2mkd/pair0: 200/1,000 (20 %), loss 1.5 (task 1 + distillation 0.5), 1:20 left",
        "m2mkd/pair0: 300/1,000 (30 %), loss 1.5 (task 1 + distillation 0.5), 1:10 left",
        "m2mkd/pair0: finished in 30 s, hybrid accuracy 81.2 %",
    ]


def test_time_left_of_a_resumed_step_counts_only_what_this_process_did() -> None:
    clock = Clock()
    display, output = plain(clock)
    with display:
        display.start("teacher", 1000, done=900)
        clock.now += 20.0
        display.update("teacher", 910, images_per_second=1234.5)
        display.finish("teacher")
    lines = output.getvalue().splitlines()
    assert lines[0] == "teacher: continues at 900/1,000"
    assert lines[1] == "teacher: 910/1,000 (91 %), 1,234 images/s, 3:00 left"  # 10 steps in 20 s, 90 to go


def test_leaving_early_says_where_each_step_stopped() -> None:
    display, output = plain()

    def interrupted() -> None:
        with display:
            display.start("meta", 50)
            display.update("meta", 7)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert output.getvalue().splitlines()[-1] == "meta: stopped at 7/50"
    assert display.running == ()


def terminal() -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, force_terminal=True, width=120, height=40, color_system="standard"), output


def shown(output: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())


def test_a_terminal_shows_bars_and_keeps_the_finish_line() -> None:
    console, output = terminal()
    with ProgressDisplay(console, clock=Clock()) as display:
        display.start("m2mkd/pair0", 10)
        display.start("m2mkd/pair1", 10)
        display.update("m2mkd/pair1", 4, loss=0.25, images_per_second=10.0)
        assert display.running == ("m2mkd/pair0", "m2mkd/pair1")
        time.sleep(0.4)  # the table is drawn four times a second
        display.message("[not markup]")
        display.finish("m2mkd/pair1", "81.2 %")
    text = shown(output)
    assert re.search(r"m2mkd/pair1 +running +━+.* 4/10 +0.25 +10 ", text)
    assert "[not markup]" in text
    assert "m2mkd/pair1: finished in 0 s, 81.2 %" in text
    assert "m2mkd/pair0: stopped at 0/10" in text
    assert "starts, 10" not in text


def test_the_table_holds_what_others_do_and_what_is_still_to_come(tmp_path) -> None:
    plan = [{"name": name, "phase": "m2mKD", "needs": [], "training_steps": 20} for name in ("pair0", "pair1", "pair2")]
    plan[2]["needs"] = ["pair0", "pair1"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    lease = {"host": "elsewhere", "heartbeat": 1, "interval": 5.0, "state": "held"}
    for name in ("pair0", "pair1"):
        (tmp_path / "steps" / name / "lease").mkdir(parents=True)
        (tmp_path / "steps" / name / "lease" / "1.json").write_text(json.dumps(lease))
    console, output = terminal()
    clock = Clock()
    with ProgressDisplay(console, clock=clock, folder=tmp_path / "opened later") as display:
        display._live.refresh()
    assert shown(output).strip() == ""
    with ProgressDisplay(console, clock=clock, folder=tmp_path) as display:
        display.start("pair0", 20)
        clock.now += 5.0
        display.update("pair0", 10, loss=0.5)
        display._live.refresh()
    text = shown(output)
    assert re.search(r"pair0 +running +━+.* 10/20 +0.5 +5 s", text)  # here
    assert re.search(r"pair1 +running +━+.* 0/20 +elsewhere", text)
    assert re.search(r"pair2 +waiting", text)
    # pair0 has 10 of its steps to go at half a second each, pair2 is thought to take as long a step
    assert "0 of 3 steps finished, 2 running, 1 waiting; about 20 s left on the critical path" in text
    (tmp_path / "steps" / "pair0" / "result.json").write_text('{"steps": 20, "metrics": {"test_accuracy": 75.0}}')
    output.seek(0)
    with ProgressDisplay(console, clock=clock, folder=tmp_path) as display:
        display.start("pair0", 20)  # another one has finished it since the worker here died
        display._live.refresh()
    assert re.search(r"pair0 +finished +━+.* 20/20 +test 75.0 %", shown(output))


def test_drawing_and_printing_do_not_wait_for_each_other() -> None:
    console, output = terminal()
    display = ProgressDisplay(console, clock=Clock())

    def work() -> None:
        with display:
            for index in range(30):
                display.start("meta", 10)
                display._live.refresh()
                display.message(f"line {index}")
                display.finish("meta")

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    for _ in range(30):
        if display._live is not None:
            display._live.refresh()
    worker.join(timeout=30)
    assert not worker.is_alive()
    assert "line 29" in shown(output)


def test_a_restarted_step_begins_again() -> None:
    output = io.StringIO()
    with ProgressDisplay(Console(file=output, force_terminal=True, width=100), clock=Clock()) as display:
        display.start("meta", 10)
        display.update("meta", 9)
        display.start("meta", 10, done=5)
        assert display.running == ("meta",)
        display.finish("meta")
    assert "meta: finished" in output.getvalue()


def test_long_lines_are_not_wrapped_in_a_file() -> None:
    display, output = plain()
    with display:
        display.message("x " * 100)
    assert len(output.getvalue().splitlines()) == 1


def test_wrong_events_are_named() -> None:
    display, _ = plain()
    with display:
        with pytest.raises(UnknownNameError, match="did you mean 'start'"):
            display.event({"kind": "strat", "step": "meta"})
        display.start("meta", 3)
        with pytest.raises(UnknownNameError, match=r"'mta'.*did you mean 'meta'.*start first"):
            display.update("mta", 1)
        with pytest.raises(M2MKDError, match="lacks 'total'"):
            display.event({"kind": "start", "step": "meta"})


def test_many_threads_may_report_at_once() -> None:
    display, output = plain(interval=0.0)

    def work(name: str) -> None:
        display.start(name, 50)
        for done in range(1, 51):
            display.update(name, done, loss=1.0 / done)
        display.finish(name)

    with display:
        threads = [threading.Thread(target=work, args=(f"m2mkd/pair{slot}",)) for slot in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = output.getvalue().splitlines()
    assert len(lines) == 8 * 52
    for slot in range(8):
        own = [line for line in lines if line.startswith(f"m2mkd/pair{slot}: ")]
        counts = [int(line.split("/")[1].split(": ")[1]) for line in own[1:-1]]
        assert counts == list(range(1, 51))


def test_queue_reports_are_thinned_but_starts_and_ends_are_not() -> None:
    events: queue.Queue = queue.Queue()
    clock = Clock()
    progress = QueueProgress(events, interval=1.0, clock=clock)
    progress.start("meta", 100)
    for done in range(1, 101):
        clock.now += 0.25
        progress.update("meta", done)
    progress.finish("meta")
    received = [events.get_nowait() for _ in range(events.qsize())]
    assert [event["kind"] for event in received] == ["start", *["update"] * 25, "finish"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (8.4, "8 s"), (59.7, "1:00"), (187, "3:07"), (7387, "2:03:07"), (3600, "1:00:00")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
