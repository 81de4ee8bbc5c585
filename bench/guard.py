"""Bounds for what would wait for ever: an engine waits as long as it takes for its next feeder."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from common.errors import WeightFeederError


class TookTooLong(WeightFeederError):
    """A setting was given up."""


class _GivenUp(BaseException):
    """Passes through what is interrupted, which must not take it for an error of its own: the client
    would remember it, and raise it again when the next setting is measured."""

    def __init__(self, error: WeightFeederError) -> None:
        self.error = error


@contextmanager
def limited(limit_s: float, look: Callable[[], object]) -> Iterator[None]:
    """For the main thread: raises TookTooLong out of whatever it does when the time is up, and what
    ``look`` raises when a child process has ended."""

    def overdue(number: int, frame: FrameType | None) -> None:
        raise _GivenUp(TookTooLong(f"given up after {limit_s:.0f} s"))

    def child_ended(number: int, frame: FrameType | None) -> None:
        try:
            look()
        except WeightFeederError as error:
            raise _GivenUp(error) from error

    old_alarm, old_child = signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGCHLD)

    def restore() -> None:
        signal.signal(signal.SIGCHLD, old_child)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old_alarm)  # whose default is the end: not before the timer's

    try:
        try:
            signal.signal(signal.SIGALRM, overdue)
            signal.signal(signal.SIGCHLD, child_ended)
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            look()
            yield
        finally:
            restore()
    except _GivenUp as given_up:
        restore()  # which may have been cut off itself
        raise given_up.error from None
