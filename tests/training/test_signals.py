from __future__ import annotations

import os
import signal

import pytest

from pipeline.training.signals import SIGNALS, Stopped, stop_requests


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_only_sets_the_flag(number):
    with stop_requests() as request:
        assert not request
        os.kill(os.getpid(), number)
        assert request
        assert request.signal_name == signal.Signals(number).name


def test_handlers_from_before_come_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop_requests():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_stopped_is_an_exit_with_85():
    assert isinstance(Stopped(3, "SIGTERM"), SystemExit)
    assert Stopped(3, "SIGTERM").code == 85
