"""A process with a terminal of its own, as a person has it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.processes import PATIENCE_S, ROOT, Room


class Terminal:
    """A process with a terminal of its own, as its session's leader."""

    def __init__(self, room: Room, *command: str) -> None:
        self._ours, theirs = pty.openpty()
        modes = termios.tcgetattr(theirs)
        modes[3] &= ~termios.ECHO  # what is typed is not to be taken for what is said
        termios.tcsetattr(theirs, termios.TCSANOW, modes)
        self.popen = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=room.environment | {"TERM": "dumb"},
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 no threads here
        )  # fmt: skip
        os.close(theirs)
        self._unread = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def read_until(self, text: str) -> str:
        """What is said up to and including ``text``."""
        assert self._read_within(text, PATIENCE_S), f"no {text!r} in {self._unread!r}"
        before, found, self._unread = self._unread.partition(text)
        return before + found

    def _read_within(self, text: str, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while text not in self._unread and time.monotonic() < end:
            if select.select([self._ours], [], [], 0.2)[0]:
                try:
                    self._unread += os.read(self._ours, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    raise AssertionError(f"ended before {text!r}: {self._unread!r}") from None
        return text in self._unread

    def answer(self, line: str, prompt: str = "(Pdb) ") -> str:
        """What is said to a line, up to the next prompt."""
        self.type(line + "\n")
        return self.read_until(prompt)

    def interrupt(self, prompt: str) -> str:
        """What is said to Ctrl-C at a prompt, up to the next one. A signal that comes after readline has
        written its prompt and before it sleeps is noticed at the next one only, so that it is repeated."""
        for _ in range(int(PATIENCE_S / 5)):
            time.sleep(0.2)
            self.type("\x03")
            if self._read_within(prompt, 5.0):
                break
        return self.read_until(prompt)

    def end(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        os.close(self._ours)


@contextmanager
def terminal(room: Room, *command: str) -> Iterator[Terminal]:
    it = Terminal(room, *command)
    try:
        yield it
    finally:
        it.end()
