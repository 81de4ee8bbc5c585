"""The host store: the whole INT4 store in one shared, pinned piece of host memory.

Owns that memory and its layout; knows nothing of slots. The layout is not the file's: weights lie in
order of use, each in one piece, codes first and scales right behind them, so that one copy brings all
of a weight, and what arrives is a packed slot as it is.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from common.blocks import PACKED_ALIGNMENT, code_bytes, packed_span, scale_count, scales_offset
from common.config import format_bytes
from common.errors import PeerError, StoreCorruptError
from common.log import log
from common.memory import PIN_CHUNK_BYTES, Memory
from common.progress import progress
from common.shared import SHM_DIRECTORY, SharedMemory
from common.store import Store, WeightEntry

LAYOUT_VERSION = 2


@dataclass(frozen=True)
class Place:
    """Where a packed weight of ``elements`` values lies in the host store: its codes at
    ``offset_bytes``, its scales at ``offset_bytes + scales_at``; ``size_bytes`` spans both."""

    elements: int
    offset_bytes: int
    scales_at: int
    size_bytes: int


def lay_out(entries: tuple[WeightEntry, ...]) -> tuple[list[Place], int]:
    """The place of every weight, and the bytes of the whole. No weight crosses a chunk of pinned
    memory, unless it is larger than one."""
    layout: list[Place] = []
    offset = 0
    for entry in entries:
        size = packed_span(entry.elements)
        if offset // PIN_CHUNK_BYTES != (offset + size - 1) // PIN_CHUNK_BYTES:
            offset = -(-offset // PIN_CHUNK_BYTES) * PIN_CHUNK_BYTES
        layout.append(Place(entry.elements, offset, scales_offset(entry.elements), size))
        offset += -(-size // PACKED_ALIGNMENT) * PACKED_ALIGNMENT
    return layout, offset


class HostStore:
    """The loaded store. ``tensor``: uint8, all of it; ``places[weight]``: where each weight lies."""

    def __init__(self, store: Store, shared: SharedMemory, unpin: Callable[[], None]) -> None:
        self.store = store
        self.places, self.size_bytes = lay_out(store.weights)
        self.tensor = shared.tensor
        self._shared, self._unpin = shared, unpin

    @classmethod
    def load(cls, store: Store, memory: Memory, keep_name: str | None = None) -> HostStore:
        """Read the store into shared memory, verify its checksums, pin it.

        ``keep_name``: its name in /dev/shm if it is to outlive this process.
        Raises StoreCorruptError, naming the weight, and MemoryShortageError.
        """
        places, size_bytes = lay_out(store.weights)
        if keep_name:
            shared = SharedMemory.create_named(size_bytes, keep_name + ".partial")
        else:
            shared = SharedMemory.create(size_bytes, "store")
        try:
            start = time.monotonic()
            _read(store, places, shared.tensor)
            read = time.monotonic()
            unpin = memory.pin(shared.tensor)
            log.debug(
                "%s of packed weights: read and checked in %.1f s, page-locked in %.1f s",
                format_bytes(size_bytes), read - start, time.monotonic() - read,
            )  # fmt: skip
        except BaseException:
            if keep_name:
                Path(shared.path).unlink(missing_ok=True)
            shared.close()
            raise
        if keep_name:  # only a complete store ever has the name that a successor looks for
            os.rename(shared.path, SHM_DIRECTORY / keep_name)
        return cls(store, shared, unpin)

    @classmethod
    def adopt(cls, store: Store, memory: Memory, keep_name: str) -> HostStore | None:
        """The host store that a former feeder left under ``keep_name``, or None if it left none.

        Verified as a file is, while it is being pinned. Raises StoreCorruptError, naming the weight.
        """
        places, size_bytes = lay_out(store.weights)
        try:
            shared = SharedMemory.open(str(SHM_DIRECTORY / keep_name), size_bytes, writable=True)
        except (OSError, PeerError):
            return None
        start, stop = time.monotonic(), threading.Event()
        with ExitStack() as undo:
            undo.callback(shared.close)
            with ThreadPoolExecutor(1, thread_name_prefix="check") as checker:
                checked = checker.submit(_damage, store, places, shared.tensor, stop)
                try:
                    unpin = memory.pin(shared.tensor)
                    undo.callback(unpin)
                    damage = checked.result()
                finally:
                    stop.set()
            if damage:  # as a text: an exception would keep the memory for as long as it is about
                raise StoreCorruptError(damage)
            undo.pop_all()
        log.debug("checked and page-locked in %.1f s", time.monotonic() - start)
        return cls(store, shared, unpin)

    @property
    def inode(self) -> int:
        """By which a name in /dev/shm is known to be this memory's."""
        return os.fstat(self._shared.fd).st_ino

    def close(self) -> None:
        self._unpin()
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self._shared.close()

    def packed(self, weight: int) -> torch.Tensor:
        """The whole weight as it lies in host memory, uint8 [packed_span(elements)]."""
        place = self.places[weight]
        return self.tensor[place.offset_bytes :][: place.size_bytes]

    def codes(self, weight: int) -> torch.Tensor:
        """The weight's codes, uint8 [ceil(elements / 2)], in host memory."""
        return _parts(self.places[weight], self.tensor)[0]

    def scales(self, weight: int) -> torch.Tensor:
        """The weight's scales, bf16 [ceil(elements / 128)], in host memory."""
        return _parts(self.places[weight], self.tensor)[2].view(torch.bfloat16)


def _read(store: Store, places: list[Place], destination: torch.Tensor) -> None:
    """All weights: each is read straight into place, and checked there."""
    stop = threading.Event()

    def read(index: int) -> None:
        entry, place = store.weights[index], places[index]
        codes, gap, scales = _parts(place, destination)
        store.read_weight_into(entry, codes, scales, stop)
        gap.zero_()
        store.check(entry, codes, scales)

    _for_all(store, read, "loading the store", stop)


def _damage(store: Store, places: list[Place], held: torch.Tensor, stop: threading.Event) -> str:
    """What is wrong with a weight where it lies, "" if nothing is."""

    def check(index: int) -> None:
        entry, (codes, _, scales) = store.weights[index], _parts(places[index], held)
        try:
            store.check(entry, codes, scales)
        except StoreCorruptError:  # whose advice is about a file
            raise StoreCorruptError(f"{entry.name} is not what was loaded") from None

    try:
        _for_all(store, check, "checking the kept store", stop)
    except StoreCorruptError as error:
        return str(error)
    return ""


def _parts(place: Place, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight's codes, what lies between, and its scales, all uint8."""
    packed = memory[place.offset_bytes :][: place.size_bytes]
    end = code_bytes(place.elements)
    scales = packed[place.scales_at :][: 2 * scale_count(place.elements)]
    return packed[:end], packed[end : place.scales_at], scales


def _for_all(store: Store, work: Callable[[int], None], what: str, stop: threading.Event) -> None:
    """``work`` for each weight, in parallel, the largest first. When one fails, or this thread is
    interrupted, the others are told to ``stop``, as anyone else may tell them, and none begins any more."""

    def run(index: int) -> int:
        if not stop.is_set():
            work(index)
        return store.weights[index].packed_bytes

    order = sorted(range(len(store.weights)), key=lambda index: -store.weights[index].packed_bytes)
    workers = min(16, len(os.sched_getaffinity(0)))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="load")
    try:
        with progress(store.packed_bytes, what) as bar:
            for size in pool.map(run, order):
                bar.update(size)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
