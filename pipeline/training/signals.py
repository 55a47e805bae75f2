"""Stopping on request: a signal only sets a flag, which the loop acts on when all ranks have seen it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.launch.ranks import STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class Stopped(SystemExit):
    """Training was asked to stop and has saved a checkpoint; running it again goes on from there. Exit code 85."""

    def __init__(self, step: int, signal_name: str):
        super().__init__(STOPPED)
        self.step = step
        self.signal_name = signal_name


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Handles SIGTERM, SIGINT and SIGUSR2 inside the block; main thread only."""
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
