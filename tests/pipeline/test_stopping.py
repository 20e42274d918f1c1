"""Signals ask for a stop; a second interrupt does not wait; afterwards everything is as it was."""

from __future__ import annotations

import signal
import threading

import pytest

from m2mkd_fast import cli
from m2mkd_fast.pipeline.stopping import EXIT_REQUEUE, Stopped, handle_stop_signals, request_stop, stop_requested

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


@pytest.mark.parametrize("number", ASKING, ids=lambda number: number.name)
def test_a_signal_asks_and_the_request_ends_with_the_context(number):
    before = signal.getsignal(number)
    with handle_stop_signals():
        assert not stop_requested()
        signal.raise_signal(number)
        assert stop_requested()
    assert not stop_requested()
    assert signal.getsignal(number) is before


def test_the_second_interrupt_is_immediate_whatever_asked_before():
    with handle_stop_signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_request_needs_no_signal():
    with handle_stop_signals():
        request_stop()
        assert stop_requested()


def test_outside_the_main_thread_handlers_stay():
    before = [signal.getsignal(number) for number in ASKING]
    inside = []

    def work():
        with handle_stop_signals():
            inside.extend(signal.getsignal(number) for number in ASKING)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == before


def test_the_command_line_says_that_it_goes_on_and_exits_for_a_requeue(monkeypatch, capsys):
    def stopped(options):
        signal.raise_signal(signal.SIGTERM)
        assert stop_requested()
        raise Stopped("step teacher was stopped at 4 of 8")

    monkeypatch.setattr(cli, "_run", stopped)
    assert cli.main(["run", "any.yaml"]) == EXIT_REQUEUE == 75
    said = capsys.readouterr().err
    assert said == "m2mkd: stopped: step teacher was stopped at 4 of 8; the same command goes on from there\n"
    assert not stop_requested()


def test_commands_that_save_nothing_end_as_ever(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    seen = []
    monkeypatch.setattr(cli, "_info", lambda options: seen.append(signal.getsignal(signal.SIGTERM)))
    assert cli.main(["info"]) == 0
    assert seen == [before]
