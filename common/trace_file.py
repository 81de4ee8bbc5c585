"""The file of a trace, which several processes append to. Knows lines, and nothing of what they say.

The file is one JSON array, one event a line. While processes write, its closing bracket is missing,
which viewers of traces accept; the last to leave adds it. Every append is one write of whole lines
under a lock, and the next append cuts off what a process that was killed in the midst of one left.

Both locks are record locks on bytes far behind the end, so the kernel drops them with their process:
one is held for the length of an append, the other, shared, for as long as a process may append.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from common.errors import UsageError

#: The first line, which tells our traces from other files.
HEAD = b'[{"ph":"M","name":"weight-feeder trace","pid":0,"tid":0,"args":{"version":1}},\n'

_APPENDING, _PRESENT = 1 << 40, (1 << 40) + 1  # the bytes that are locked
_PATIENCE_S = 1.0  # for others who open, append or close
_LONGEST_LINE = 1 << 20


class TraceFile:
    """One process's part in a trace. One object a process and file: record locks belong to both."""

    def __init__(self, path: str | Path) -> None:
        """Create the file, or join those who write to it.

        UsageError if it exists and is not the trace of processes that are running.
        """
        self._path, self._fd = Path(path), -1
        self._end = time.monotonic() + _PATIENCE_S
        while not self._open():
            time.sleep(0.01)

    def append(self, lines: bytes, patience_s: float = 0.0) -> bool:
        """Add whole lines, each ending in a comma and a newline. False if another process is at it
        for longer than ``patience_s``: try again later. OSError if the disk does not take them."""
        if not self._lock(_APPENDING, patience_s):
            return False
        try:
            self._write(self._reopened() + lines)
        finally:
            self._unlock(_APPENDING)
        return True

    def close(self) -> None:
        """Leave. The last to leave completes the array, or removes a file without any event."""
        if self._fd < 0:
            return
        if self._lock(_APPENDING, _PATIENCE_S) and self._alone():
            self._complete()
        os.close(self._fd)  # and with it go the locks
        self._fd = -1

    # Opening -----------------------------------------------------------------------------------

    def _open(self) -> bool:
        """False if someone else is just creating or removing the file."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._fd, created = os.open(self._path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            try:
                self._fd, created = os.open(self._path, flags), False
            except FileNotFoundError:
                return False
            except OSError:
                raise self._refused() from None
        except OSError as error:
            raise UsageError(
                f"trace file {self._path} cannot be written: {error.strerror}"
            ) from error
        try:
            return self._begin() if created else self._join()
        except BaseException:
            os.close(self._fd)
            raise

    def _begin(self) -> bool:
        if not self._lock(_APPENDING, _PATIENCE_S):
            raise self._refused()
        self._write(HEAD)
        fcntl.lockf(self._fd, fcntl.LOCK_SH, 1, _PRESENT)
        self._unlock(_APPENDING)
        return True

    def _join(self) -> bool:
        if not self._lock(_APPENDING, _PATIENCE_S):
            raise self._refused()
        ours = os.pread(self._fd, len(HEAD), 0) == HEAD and not self._alone()
        if ours:
            fcntl.lockf(self._fd, fcntl.LOCK_SH, 1, _PRESENT)
        self._unlock(_APPENDING)
        if not ours:
            if os.fstat(self._fd).st_size or time.monotonic() > self._end:
                raise self._refused()
            os.close(self._fd)  # empty: it may be that its creator is about to lock it
        return ours

    def _refused(self) -> UsageError:
        return UsageError(f"trace file {self._path} exists: remove it, or name another")

    # Locks -------------------------------------------------------------------------------------

    def _lock(self, byte: int, patience_s: float) -> bool:
        end = time.monotonic() + patience_s
        while True:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
                return True
            except (BlockingIOError, PermissionError):
                if time.monotonic() >= end:
                    return False
                time.sleep(0.001)

    def _unlock(self, byte: int) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, byte)

    def _alone(self) -> bool:
        """Whether no other process may append. Call it with the lock on appending."""
        return self._lock(_PRESENT, 0.0)

    # The end of the file -----------------------------------------------------------------------

    def _reopened(self) -> bytes:
        """Cut off what does not belong before another line; what has to be put there instead."""
        size = os.fstat(self._fd).st_size
        if os.pread(self._fd, 2, max(0, size - 2)) == b",\n":
            return b""
        start = max(len(HEAD) - 2, size - _LONGEST_LINE)
        tail = os.pread(self._fd, size - start, start)
        whole = tail[: tail.rfind(b"\n") + 1].rstrip(b"\n],")
        os.ftruncate(self._fd, start + len(whole))
        return b",\n"

    def _complete(self) -> None:
        if os.fstat(self._fd).st_size == len(HEAD):
            self._path.unlink(missing_ok=True)
            return
        try:
            self._write(self._reopened())
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - 2)
            self._write(b"\n]\n")
        except OSError:
            pass  # the disk is full: viewers do without the bracket

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]
