"""Child processes of the launcher: started, watched, and none of them left behind.

Each child has a leash: a socket that tells the child when the launcher is gone, and the launcher why
the child failed. Children are in process groups of their own, so that Ctrl-C reaches the launcher
alone, which ends them in order.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

from common.errors import EXIT_ERROR, WeightFeederError
from common.process import LEASH_VARIABLE, Terminated

GRACE_S = 15.0  # for a child to give everything back, before it is killed


class ChildFailed(WeightFeederError):
    """A child ended as it should not; the text is the first cause."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code  # type: ignore[misc]


@dataclass
class Child:
    name: str
    process: subprocess.Popen[bytes]
    leash: socket.socket
    exit_fd: int
    told: bytes = b""


class Supervisor:
    """``with`` it round the children: at the end all of them are gone, whatever happened."""

    def __init__(self) -> None:
        self._children: list[Child] = []
        self._cause = ""
        self._signal = 0
        self.leave_interrupts = False  # Ctrl-C is for a child in the foreground, not for us
        self._selector = selectors.DefaultSelector()
        self._alarm, alarm = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._alarm_in = alarm

    def __enter__(self) -> Supervisor:
        signal.set_wakeup_fd(self._alarm_in)
        self._selector.register(self._alarm, selectors.EVENT_READ, None)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            self._end(child)
        signal.set_wakeup_fd(-1)
        self._selector.close()
        os.close(self._alarm)
        os.close(self._alarm_in)

    def start(self, name: str, command: list[str], foreground: bool = False) -> Child:
        """Start a child. ``foreground``: it stays in our process group and may read the terminal."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                command,
                stdin=None if foreground else subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | {LEASH_VARIABLE: str(theirs.fileno())},
                process_group=None if foreground else 0,
            )
        ours.setblocking(False)
        child = Child(name, process, ours, os.pidfd_open(process.pid))
        self._children.append(child)
        self._selector.register(child.exit_fd, selectors.EVENT_READ, child)
        self._selector.register(child.leash, selectors.EVENT_READ, child)
        return child

    def run(self, name: str, command: list[str]) -> None:
        """Start a child and wait for its end. ChildFailed if it, or another child, fails."""
        child = self.start(name, command)
        self.wait(until=child)
        self._end(child)
        self._children.remove(child)

    def wait(self, until: Child | None, timeout_s: float | None = None) -> None:
        """Until that child has ended well, or the time is up. Raises ChildFailed with the first
        cause if any child fails or ends before it, Terminated on a signal."""
        while True:
            ready = self._selector.select(timeout_s)
            if self._signal:
                raise Terminated(self._signal)
            if not ready:
                return
            for key, _ in ready:
                child = key.data
                if child is None:  # a signal that is not for us
                    with suppress(BlockingIOError):
                        os.read(self._alarm, 512)
                    continue
                if key.fileobj is child.leash:
                    self._listen(child)
                    continue
                self._listen(child)  # its last words may still be in the socket
                code = child.process.wait()
                if child is until and code == 0:
                    return
                raise ChildFailed(*self._explain(child, code))

    def _listen(self, child: Child) -> None:
        try:
            while data := child.leash.recv(65536):
                child.told += data
            if child.leash in self._selector.get_map():
                self._selector.unregister(child.leash)
        except BlockingIOError:
            pass
        except OSError:
            return
        if not self._cause and b"\n" in child.told:
            text = json.loads(child.told.partition(b"\n")[0])["error"]
            self._cause = f"{child.name}: {text}"

    def _explain(self, child: Child, code: int) -> tuple[str, int]:
        if self._cause:
            return self._cause, code if code > 0 else EXIT_ERROR
        if code < 0:
            return f"the {child.name} was killed by {signal.Signals(-code).name}", EXIT_ERROR
        if code == 0:
            return f"the {child.name} ended before the engine had", EXIT_ERROR
        return f"the {child.name} ended with exit code {code}", code

    def _end(self, child: Child) -> None:
        """SIGTERM, patience, SIGKILL; then forget it."""
        if child.process.poll() is None:
            child.process.terminate()
            # A child that is stopped (a debugger, Ctrl-Z) acts on no signal before it goes on.
            child.process.send_signal(signal.SIGCONT)
            try:
                child.process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        for source in (child.exit_fd, child.leash):
            if source in self._selector.get_map():
                self._selector.unregister(source)
        if child.exit_fd >= 0:
            os.close(child.exit_fd)
            child.exit_fd = -1
            child.leash.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not (number == signal.SIGINT and self.leave_interrupts):
            self._signal = self._signal or number
