"""Processes: their private run directory, who is alive, how they end. Knows nothing of models.

A peer's death is seen through a pidfd, which becomes readable when the process is gone for good
(memory, GPU context and all) and at no other moment: a process stopped in a debugger is not dead.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from common.errors import ConfigError, PeerError, UsageError, WeightFeederError
from common.log import log
from common.wait import Wakeup

#: Names the descriptor that a launcher hands to the processes it starts.
LEASH_VARIABLE = "WEIGHT_FEEDER_LEASH"

#: Held by an engine that has its model, and with it most of the device memory that it will take.
ENGINE_LOCK = "engine.lock"
MODEL_LOCK = "model.lock"

LOOK_S = 1.0  # how often who waits for a lock looks round


def run_path(name: str) -> Path:
    """Where the run directory of ``name`` is or would be. UsageError if no such name can be."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise UsageError(
            f"name {name!r} is not usable: give up to 64 letters, digits, dots, dashes, underscores"
        )
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime) and os.access(runtime, os.W_OK):
        base = Path(runtime) / "weight-feeder"
    else:
        base = Path(tempfile.gettempdir()) / f"weight-feeder-{os.getuid()}"
    return base / name


def run_directory(name: str) -> Path:
    """The private directory of all processes called ``name``; made, mode 0700, if it is not there."""
    path = run_path(name)
    _make_run_directory(path)
    return path


def _make_run_directory(path: Path) -> None:
    for attempt in range(1000):
        try:
            for directory in (path.parent, path):
                with suppress(FileExistsError):
                    directory.mkdir(mode=0o700)
                _require_private(directory)
            return
        except FileNotFoundError:  # someone who leaves has removed it, as it was empty: again
            if attempt == 999:
                raise


def _require_private(directory: Path) -> None:
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"run directory {directory} is not private to this user: expected a directory of"
            " mode 0700 that you own; remove it, or set XDG_RUNTIME_DIR"
        )


def _is_private(directory: Path) -> bool:
    try:
        _require_private(directory)
    except (ConfigError, OSError):
        return False
    return True


def remove_run_directory(directory: Path) -> None:
    """Remove the directory, and the one above, if they are ours and nobody has anything in them."""
    for path in (directory, directory.parent):
        if not _is_private(path):
            return
        try:
            path.rmdir()
        except OSError:
            return


def clear_run_directory(directory: Path) -> None:
    """Remove what killed processes left in it. What belongs to a living one stays, and everything in
    a directory that is not private to this user (root could remove it all the same)."""
    if not (_is_private(directory.parent) and _is_private(directory)):
        return
    for role in ("feeder", "engine", "model"):
        path = directory / f"{role}.lock"
        if not path.exists():
            continue
        lock = Lock(path, role)
        try:
            lock.acquire()  # so that nobody binds the socket that is about to be removed
        except UsageError:
            continue
        path.with_suffix(".sock").unlink(missing_ok=True)
        lock.release()
    remove_run_directory(directory)


def _is_ending(pid: int | None) -> bool:
    """Whether the process has been killed and still gives back what it had: gigabytes take a while."""
    try:
        os.readlink(f"/proc/{pid}/exe")
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


class Lock:
    """Held by the one feeder (or engine) of a name for as long as it lives: the kernel drops it with
    the process. The file tells others the pid.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what
        self._fd = -1

    def acquire(self) -> None:
        """UsageError, naming the holder's pid, if another process holds it."""
        start = time.monotonic()
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            try:
                fd = os.open(self._path, flags, 0o600)
            except FileNotFoundError:  # the directory was empty until now, and someone removed it
                _make_run_directory(self._path.parent)
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                holder, waited = self.holder(self._path), time.monotonic() - start
                # Someone may only be looking, see ``holder``; and a killed one needs time to end.
                if waited < 0.3 or (waited < 10 and _is_ending(holder)):
                    time.sleep(0.02)
                    continue
                raise UsageError(
                    f"{self._what} {self._path.parent.name!r} runs already, pid {holder or '?'}:"
                    " end that one, or choose another --name"
                ) from None
            try:  # its former holder may have removed the file between our open and our lock
                if os.stat(self._path).st_ino == os.fstat(fd).st_ino:
                    break
            except FileNotFoundError:
                pass
            os.close(fd)
        os.ftruncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
        self._fd = fd

    def acquire_after_others(self, look: Callable[[int], None]) -> None:
        """Wait until the processes that hold it have ended. ``look`` is called about every second with the
        pid of the holder, 0 if that cannot be found out."""
        while True:
            try:
                return self.acquire()
            except UsageError:
                pid = self.holder(self._path) or 0
            look(pid)
            try:
                fd = watch(pid)
            except PeerError:  # it has just ended, or lives where we cannot see it
                time.sleep(LOOK_S)
                continue
            try:
                while self.holder(self._path) == pid:
                    if select.select([fd], [], [], LOOK_S)[0]:
                        break
                    look(pid)
            finally:
                os.close(fd)

    def release(self) -> None:
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    @staticmethod
    def holder(path: Path) -> int | None:
        """The pid of the living holder, or None if nobody holds the lock."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            text = os.read(fd, 32)
            return int(text) if text.isdigit() else None
        finally:
            os.close(fd)


def watch(pid: int) -> int:
    """A descriptor that becomes readable when ``pid`` has ended. PeerError if it has already."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise PeerError(f"process {pid} is gone: {error.strerror}") from error
    except OverflowError as error:  # the pid may be any number that a peer sent
        raise PeerError(f"process {pid} cannot be: {error}") from error


class Terminated(WeightFeederError):
    """SIGTERM or SIGINT arrived."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number  # type: ignore[misc]


class SignalFlag:
    """For a poll loop: SIGTERM and SIGINT set ``received`` and wake the loop, no more."""

    def __init__(self, wakeup: Wakeup) -> None:
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        wakeup.set_on_signals()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number


class TerminatedNow(KeyboardInterrupt):
    """SIGTERM, raised amid whatever the main thread does. Like Ctrl-C it is no Exception: a library
    that tries something, as transformers does while it is imported, would else swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def raise_on_termination() -> None:
    """For a main thread that computes: SIGTERM raises TerminatedNow where it is."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise TerminatedNow(number)

    signal.signal(signal.SIGTERM, terminate)


class Leash:
    """The line to the launcher that started this process, if one did.

    Its descriptor becomes readable when the launcher is gone, however it went: then this process
    ends too. And the launcher is told through it why this process failed, so that it can print the
    first cause last.
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        text = os.environ.pop(LEASH_VARIABLE, "")
        if text.isdigit():
            try:
                self._socket = socket.socket(fileno=int(text))
                self._socket.set_inheritable(False)
            except OSError:
                self._socket = None  # inherited through a process that closed it

    @property
    def fd(self) -> int | None:
        return self._socket.fileno() if self._socket else None

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """While the main thread is busy and polls nothing: the launcher's end ends it by SIGTERM."""
        fd = self.fd
        if fd is None:
            yield
            return
        done = Wakeup()

        def watch_launcher() -> None:
            ready, _, _ = select.select([fd, done.fd], [], [])
            if done.fd not in ready:
                log.error("the launcher is gone")
                os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=watch_launcher, name="leash", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            done.close()

    def report(self, text: str) -> bool:
        """Tell the launcher what went wrong; False if there is none, and the user must be told."""
        if self._socket is None:
            return False
        try:
            self._socket.sendall(json.dumps({"error": text}).encode() + b"\n")
        except OSError:
            return False
        return True
