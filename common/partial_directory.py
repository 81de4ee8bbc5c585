"""A directory that appears whole or not at all, whenever its maker is killed.

Owns the temporary sibling `.NAME.partial-PID`, its lock, its removal and the final rename.
Knows nothing of what is written into it.

A lock on the directory tells a living maker's from a dead one's: the kernel drops it with the
process, while a process id may be reused, or belong to another container.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from common.errors import StoreError


class PartialDirectory:
    """Context manager: write into `path`, then `publish`; leaving without that removes it."""

    def __init__(self, target: Path) -> None:
        self.target = target.absolute()
        self.path = self.target.with_name(f".{self.target.name}.partial-{os.getpid()}")
        self._lock_fd = -1

    def __enter__(self) -> PartialDirectory:
        """Make the directory, and remove those that dead makers of the same target left.

        Raises StoreError if the target exists, or if the directory cannot be made.
        """
        self._refuse_existing()
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
        except OSError as error:
            raise StoreError(f"cannot write in {self.target.parent}: {error.strerror}") from error
        try:
            self.path.mkdir()
            self._lock_fd = _lock(self.path)
        except (BlockingIOError, FileExistsError):
            raise StoreError(f"{self.path} is in use, another process writes this store") from None
        except OSError as error:
            raise StoreError(f"cannot make {self.path}: {error.strerror}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.path.exists():  # not published
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def publish(self) -> None:
        """Rename the directory onto its target, durably. Its files must be on the disk by now.

        Raises StoreError if the target has come to exist meanwhile.
        """
        self._refuse_existing()
        os.fsync(self._lock_fd)
        try:
            self.path.rename(self.target)
        except OSError as error:
            raise StoreError(f"cannot make {self.target}: {error.strerror}") from error
        parent_fd = os.open(self.target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(parent_fd)
        finally:
            os.close(parent_fd)

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.target):
            raise StoreError(f"{self.target} exists; remove it first, or choose another directory")

    def _remove_stale(self) -> None:
        prefix = f".{self.target.name}.partial-"
        for path in self.target.parent.iterdir():
            if path.name.startswith(prefix) and path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):  # in use, or already gone
                    lock_fd = _lock(path)
                    try:
                        shutil.rmtree(path, ignore_errors=True)
                    finally:
                        os.close(lock_fd)


def _lock(path: Path) -> int:
    """Lock a directory; returns the descriptor that holds the lock. BlockingIOError if held."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd
    except OSError:
        os.close(fd)
        raise
