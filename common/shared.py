"""Shared host memory: POSIX shared memory that nobody can leak, unless it is asked to survive.

Anonymous memory (memfd) lives as long as some process maps it, appears nowhere in /dev/shm and is not
bounded by its size, which is 64 MB in a default container. A peer of the same user maps it through
the owner's /proc entry. Named memory lies in /dev/shm and outlives its maker: for ``--keep-store``.
See docs/decisions/0001-memfd.md.
"""

from __future__ import annotations

import mmap
import os
import warnings
from pathlib import Path

import torch

from common.errors import MemoryShortageError, PeerError

SHM_DIRECTORY = Path("/dev/shm")


class SharedMemory:
    """A mapping of shared memory: ``tensor``, uint8 of ``size_bytes``, valid until ``close``."""

    def __init__(self, fd: int, size_bytes: int, path: str, writable: bool) -> None:
        self.fd, self.size_bytes, self.path = fd, size_bytes, path
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, protection)
        with warnings.catch_warnings():  # torch warns that a read-only buffer must not be written
            warnings.simplefilter("ignore", UserWarning)
            self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)

    @classmethod
    def create(cls, size_bytes: int, label: str) -> SharedMemory:
        """Anonymous memory. MemoryShortageError if the host has not that much."""
        require_host_memory(size_bytes, label)
        fd = os.memfd_create(f"weight-feeder-{label}", os.MFD_CLOEXEC)
        os.ftruncate(fd, size_bytes)
        return cls(fd, size_bytes, f"/proc/{os.getpid()}/fd/{fd}", writable=True)

    @classmethod
    def create_named(cls, size_bytes: int, name: str) -> SharedMemory:
        """Memory at /dev/shm/``name`` that outlives this process. Replaces what has that name."""
        require_host_memory(size_bytes, name)
        room = os.statvfs(SHM_DIRECTORY)
        free_bytes = room.f_bavail * room.f_frsize
        if free_bytes < size_bytes:
            raise MemoryShortageError(
                f"{SHM_DIRECTORY} has {free_bytes:,} bytes free, keeping the store there needs"
                f" {size_bytes:,}: enlarge it (docker run --shm-size, or mount -o remount,size=),"
                " or go without --keep-store"
            )
        path = SHM_DIRECTORY / name
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        os.ftruncate(fd, size_bytes)
        return cls(fd, size_bytes, str(path), writable=True)

    @classmethod
    def open(cls, path: str, size_bytes: int, writable: bool = False) -> SharedMemory:
        """Map what another process made. OSError if it cannot be opened, PeerError if it differs."""
        flags = os.O_RDWR if writable else os.O_RDONLY
        # A peer's memfd is reached through a link in /proc; a name in /dev/shm must not be one.
        flags |= os.O_NOFOLLOW if path.startswith(f"{SHM_DIRECTORY}/") else 0
        fd = os.open(path, flags | os.O_CLOEXEC)
        found = os.fstat(fd)
        if found.st_uid != os.getuid():
            os.close(fd)
            raise PeerError(
                f"shared memory {path} belongs to user {found.st_uid}, expected our own"
            )
        if found.st_size != size_bytes:
            os.close(fd)
            raise PeerError(
                f"shared memory {path} has {found.st_size:,} bytes, expected {size_bytes:,}"
            )
        return cls(fd, size_bytes, path, writable)

    def close(self) -> None:
        """Unmap (once the last view of ``tensor`` is gone) and close. Named memory stays."""
        self.tensor = torch.empty(0, dtype=torch.uint8)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def available_host_bytes() -> int:
    """Host memory that can still be taken: the machine's, or less where a container bounds it."""
    available = 1 << 62
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    return min(available, container_bytes(Path("/sys/fs/cgroup")))


def container_bytes(cgroup: Path) -> int:
    """What the limit of ``cgroup`` (version 2) leaves; endless if it sets none. The page cache counts
    as used there, but gives way: a store that was read lately must not look like a shortage."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit == "max":
            return 1 << 62
        used = int((cgroup / "memory.current").read_text())
        for line in (cgroup / "memory.stat").read_text().splitlines():
            name, _, size = line.partition(" ")
            if name in ("active_file", "inactive_file"):
                used -= int(size)
        return int(limit) - used
    except (OSError, ValueError):
        return 1 << 62  # no cgroup of version 2: nothing more is known


def require_host_memory(size_bytes: int, label: str) -> None:
    """MemoryShortageError unless ``size_bytes`` of host memory are available."""
    available = available_host_bytes()
    if available < size_bytes:
        raise MemoryShortageError(
            f"{label} needs {size_bytes:,} bytes of host memory and {available:,} are available:"
            " free some, or use a machine (or container limit) with more"
        )
