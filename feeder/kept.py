"""The host store that outlives its feeder (``--keep-store``): who takes it, and a feeder that waits for it.

It lies in /dev/shm under a name that says whose it is and which store. Whoever has the lock of a run
directory decides about it; a feeder that stands by only looks at it, and maps it.
"""

from __future__ import annotations

import glob
import os

from common.errors import StoreCorruptError
from common.log import log
from common.memory import Memory
from common.process import Lock
from common.shared import SHM_DIRECTORY
from common.store import Store
from feeder.host import LAYOUT_VERSION, HostStore


def host_store(
    store: Store, memory: Memory, name: str, keep: bool, standby: Standby | None = None
) -> HostStore:
    """Adopted from a former feeder called ``name`` if it left one of the same store, else loaded; it will
    be left for the next one if ``keep`` says so. With the lock."""
    kept = _kept_name(name, store)
    for left in SHM_DIRECTORY.glob(f"{glob.escape(_prefix(name))}*"):
        ours = left.lstat().st_uid == os.getuid()
        if ours and left.name != kept:  # of another store, or half-loaded; we have the lock
            left.unlink(missing_ok=True)
    adopted = None if standby is None else standby.take(keep)
    if adopted is None:
        try:
            adopted = HostStore.adopt(store, memory, kept)
        except StoreCorruptError as error:
            log.warning(
                "the host store that a former feeder kept is damaged: %s; loading again", error
            )
            (SHM_DIRECTORY / kept).unlink(missing_ok=True)
    if adopted is None:
        return HostStore.load(store, memory, kept if keep else None)
    log.info("the host store that a former feeder kept is used again")
    if not keep:  # it is ours now, and ends with us
        (SHM_DIRECTORY / kept).unlink(missing_ok=True)
    return adopted


class Standby:
    """A feeder that waits for the end of those of its name, with what they keep at hand: mapped, checked and
    page-locked."""

    def __init__(self, store: Store, memory: Memory, name: str) -> None:
        self._store, self._memory, self._name = store, memory, name
        self._kept = _kept_name(name, store)
        self._host: HostStore | None = None
        self._pid = -1  # of the feeder that was waited for last
        self._damaged = 0  # the inode of what need not be looked at again

    def wait(self, lock: Lock) -> None:
        """Until ``lock`` is ours."""
        lock.acquire_after_others(self._look)

    def take(self, keep: bool) -> HostStore | None:
        """What is at hand, which is the caller's from now on; not if it is to be kept, and others have
        removed its name."""
        if keep:
            self._drop_unnamed(self._inode())
        host, self._host = self._host, None
        return host

    def close(self) -> None:
        if self._host is not None:
            self._host.close()
            self._host = None

    def _look(self, pid: int) -> None:
        """Every second: ``pid`` is the holder's, 0 if nobody can tell."""
        if pid != self._pid:
            self._pid = pid
            log.info("standing by for feeder %r, pid %s", self._name, pid or "unknown")
        inode = self._inode()
        self._drop_unnamed(inode)  # it would stay in memory for nobody
        if self._host is None and inode not in (0, self._damaged):
            self._adopt(inode)

    def _inode(self) -> int:
        """Of what is kept now; 0 if nothing is, or not yet."""
        try:
            return os.stat(SHM_DIRECTORY / self._kept, follow_symlinks=False).st_ino
        except FileNotFoundError:
            return 0

    def _drop_unnamed(self, inode: int) -> None:
        if self._host is not None and self._host.inode != inode:
            self.close()

    def _adopt(self, inode: int) -> None:
        try:
            self._host = HostStore.adopt(self._store, self._memory, self._kept)
        except StoreCorruptError as error:
            self._damaged = inode
            log.warning(
                "the host store that feeder %r has is damaged: %s; it will be loaded again",
                self._name, error,
            )  # fmt: skip


def _kept_name(name: str, store: Store) -> str:
    """Under which a feeder called ``name`` keeps the store in /dev/shm."""
    return f"{_prefix(name)}{store.fingerprint},{LAYOUT_VERSION}"


def _prefix(name: str) -> str:
    return f"weight-feeder,{os.getuid()},{name},"  # a --name has no commas
