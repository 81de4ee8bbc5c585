"""Waiting for device work without spinning: an eventfd that wakes a poll loop, a thread that waits.

``Completions`` turns "this CUDA event has fired" or "this CPU work is done" into something a poll loop
can wait for beside its sockets. Idle, neither uses any CPU.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

Token = TypeVar("Token")


class Wakeup:
    """A file descriptor that any thread or signal handler can make readable."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def set(self) -> None:
        if self.fd >= 0:
            os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Completions(Generic[Token]):
    """Runs waits in order on a thread of its own and hands their tokens to a poll loop."""

    def __init__(self, name: str, wakeup: Wakeup) -> None:
        self._wakeup = wakeup
        self._todo: SimpleQueue[tuple[Callable[[], object], Token] | None] = SimpleQueue()
        self._done: deque[tuple[Token, BaseException | None]] = deque()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, wait: Callable[[], object], token: Token) -> None:
        """``wait`` blocks until the work is complete (or does it); then ``token`` is done."""
        self._todo.put((wait, token))

    def done(self) -> list[tuple[Token, BaseException | None]]:
        """Tokens whose work has completed since the last call, with what went wrong, if anything."""
        tokens = []
        while self._done:
            tokens.append(self._done.popleft())
        return tokens

    def close(self) -> None:
        """Lets what was submitted finish, then ends the thread."""
        self._todo.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._todo.get()) is not None:
            wait, token = item
            failure: BaseException | None = None
            try:
                wait()
            except BaseException as error:  # told to the loop, which decides
                failure = error
            self._done.append((token, failure))
            self._wakeup.set()
