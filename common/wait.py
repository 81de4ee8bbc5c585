"""Waiting for device work beside sockets: what a poll loop needs to know when work is complete.

On CUDA completion is found by querying events from the loop's own thread. A thread that blocked on
each event instead would cost several hand-overs of Python's interpreter lock a weight: measured on an
H100, 1.9 ms a weight against 1.2 ms (docs/decisions/0002-one-thread.md). On the CPU the work itself
runs on a thread, since it is long and holds no lock.
"""

from __future__ import annotations

import os
import signal
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

Token = TypeVar("Token")


class Wakeup:
    """A file descriptor that any thread or signal handler can make readable."""

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._on_signals = False

    def set(self) -> None:
        try:
            if self._write_fd >= 0:
                os.write(self._write_fd, b"\0")
        except BlockingIOError:
            pass  # full, so readable as it is

    def set_on_signals(self) -> None:
        """From now on every signal that has a handler sets it too, in the moment it arrives.

        The handler itself runs later, between two bytecodes: a signal that arrives just before a
        poll begins would else be noticed only when that poll ends. Main thread only.
        """
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._on_signals = True

    def clear(self) -> None:
        try:
            os.read(self.fd, 1 << 16)  # all that a pipe holds
        except BlockingIOError:
            pass

    def close(self) -> None:
        if self._on_signals:
            signal.set_wakeup_fd(-1)
            self._on_signals = False
        for fd in (self.fd, self._write_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self._write_fd = -1


class Work(ABC):
    """Work that was begun: ``complete`` tells, without blocking, whether it is done."""

    @abstractmethod
    def complete(self) -> bool: ...


class Pending(Generic[Token]):
    """Begun work in the order it was begun, which is the order in which it completes."""

    def __init__(self) -> None:
        self._queue: deque[tuple[Work, Token]] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, work: Work, token: Token) -> None:
        self._queue.append((work, token))

    def done(self) -> list[Token]:
        """The tokens of all work that has completed since the last call."""
        tokens: list[Token] = []
        while self._queue and self._queue[0][0].complete():
            tokens.append(self._queue.popleft()[1])
        return tokens


class Worker:
    """A thread that does work in order and wakes a poll loop after each piece."""

    class _Job(Work):
        def __init__(self) -> None:
            self.finished = False
            self.failure: BaseException | None = None

        def complete(self) -> bool:
            if self.failure is not None:
                raise self.failure
            return self.finished

    def __init__(self, name: str, wakeup: Wakeup) -> None:
        self._wakeup = wakeup
        self._todo: SimpleQueue[tuple[Callable[[], object], Worker._Job] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], object]) -> Work:
        """Do ``function`` after all that was submitted before it."""
        job = Worker._Job()
        self._todo.put((function, job))
        return job

    def close(self) -> None:
        """Lets what was submitted finish, then ends the thread."""
        self._todo.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._todo.get()) is not None:
            function, job = item
            try:
                function()
                job.finished = True
            except BaseException as error:  # raised again in the loop, by ``complete``
                job.failure = error
            self._wakeup.set()
