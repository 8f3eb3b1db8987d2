"""Signals that ask a run to stop. Runs that are stopped are tried in tests/faults."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from lfmcw_app.stopping import (
    GRACE,
    Stopped,
    record_saved,
    requested,
    saved,
    settled,
    stop_signals,
    unwound,
)


def receive(number):
    os.kill(os.getpid(), number)
    if number == signal.SIGTERM:
        settled()  # or the process is given up after the grace


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_only_asks(number):
    with stop_signals():
        assert requested() is None
        receive(number)
        assert requested() == number
    assert requested() is None


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_signals():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_only_the_usual_end_is_unwound():
    """Others have their answers to a signal: nohup, a run."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        for handler in (signal.SIG_IGN, lambda number, frame: None):
            signal.signal(signal.SIGTERM, handler)
            with unwound():
                signal.raise_signal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with pytest.raises(SystemExit, match="143"), unwound():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_interrupt_stops_at_once(capsys):
    with stop_signals():
        receive(signal.SIGINT)
        assert "Press Ctrl-C again to stop at once" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            receive(signal.SIGINT)


def test_the_first_signal_counts():
    with stop_signals():
        receive(signal.SIGINT)
        receive(signal.SIGTERM)
        assert requested() == signal.SIGINT


def test_other_threads_have_no_signals():
    found = []

    def work():
        with stop_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_stop_has_the_exit_code_that_shells_expect(number, code):
    stop = Stopped(number)
    assert stop.exit_code == code
    assert number.name in str(stop)


def test_a_round_is_given_less_time_than_schedulers_give():
    assert 0 < GRACE < 10


def test_a_closed_terminal_asks_too():
    with stop_signals():
        os.kill(os.getpid(), signal.SIGHUP)
        settled()
        assert requested() == signal.SIGHUP
    assert Stopped(signal.SIGHUP).exit_code == 129


def test_a_run_under_nohup_ignores_a_closed_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert requested() is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_saved_is_told_of_this_run_only():
    with stop_signals():
        assert saved() == "its beginning"
        record_saved("the end of round 3 of 9 of the search")
        assert saved() == "the end of round 3 of 9 of the search"
    with stop_signals():
        assert saved() == "its beginning"
