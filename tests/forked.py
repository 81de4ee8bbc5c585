"""Processes forked from one that has imported the libraries, for machines where importing takes long.

``WEIGHT_FEEDER_TEST_FORK=1`` makes tests start ``python -m feeder`` and ``python -m engine`` so, and those
of the two that are started ahead of their use (`tests.process.gated`). They are processes of their own all
the same, with memory, a device and a death of their own; what is saved is seconds for each of the hundreds
that tests start and kill. Without it they are started as a user does.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing import forkserver
from multiprocessing.reduction import DupFd
from typing import IO, Any

FORKED = os.environ.get("WEIGHT_FEEDER_TEST_FORK") == "1"
MODULES = ("feeder", "engine", "tests.process.gated")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preloaded"])


def begin() -> None:
    """Start what forks, if it is asked for: before a test changes the environment, which that inherits and
    by which the processes of a room are told."""
    if FORKED:
        forkserver.ensure_running()


def forkable(command: list[str]) -> bool:
    """Whether a command is one that may be forked, and forking is asked for."""
    return FORKED and command[1] == "-m" and command[2] in MODULES


class Forked:
    """As much of subprocess.Popen as tests use. A process group of its own; nothing on stdin."""

    def __init__(
        self, command: list[str], cwd: Any, env: dict[str, str], out: IO[bytes], err: IO[bytes]
    ) -> None:
        outputs = [DupFd(stream.fileno()) for stream in (out, err)]
        self._process = _context.Process(
            target=_run, args=(command[2:], str(cwd), env, *outputs), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("forked", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(command: list[str], cwd: str, env: dict[str, str], out: Any, err: Any) -> None:
    """In the new process: ``python -m COMMAND``."""
    os.setpgid(0, 0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate((nothing, out.detach(), err.detach())):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv[1:] = command[1:]
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
