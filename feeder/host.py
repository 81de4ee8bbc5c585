"""The host store: the whole INT4 store in one shared, pinned piece of host memory.

Owns that memory and its layout; knows nothing of slots. The layout is not the file's: weights lie in
order of use, each cut into tiles, and a tile's codes and scales lie together, so that one copy of a
few tens of MB (which the link moves at its full speed) brings all that dequantizing a tile needs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import PeerError, StoreCorruptError
from common.int4 import BLOCK, code_bytes, scale_count
from common.log import log
from common.memory import PIN_CHUNK_BYTES, Memory
from common.progress import progress
from common.shared import SHM_DIRECTORY, SharedMemory
from common.store import Store, WeightEntry

TILE_BLOCKS = 9 << 16  # 36 MiB of codes: half of the largest matrix of a 32B model, 27648 x 5120
_ALIGNMENT_BYTES = 256
LAYOUT_VERSION = 1


@dataclass(frozen=True)
class Tile:
    """A run of whole blocks of one weight (the last may be short), as it lies in the host store.

    ``first``: its first element in the flattened weight. The codes lie at ``offset_bytes``, the
    scales at ``offset_bytes + scales_at``; ``size_bytes`` spans both.
    """

    first: int
    elements: int
    offset_bytes: int
    scales_at: int
    size_bytes: int


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def lay_out(entries: tuple[WeightEntry, ...]) -> tuple[list[list[Tile]], int]:
    """Tiles of every weight, and the bytes of the whole. No tile crosses a chunk of pinned memory."""
    layout: list[list[Tile]] = []
    offset = 0
    for entry in entries:
        tiles = []
        blocks = scale_count(entry.elements)
        pieces = -(-blocks // TILE_BLOCKS)
        step = -(-blocks // pieces) * BLOCK
        for first in range(0, entry.elements, step):
            elements = min(step, entry.elements - first)
            scales_at = _aligned(code_bytes(elements))
            size = scales_at + 2 * scale_count(elements)
            if offset // PIN_CHUNK_BYTES != (offset + size - 1) // PIN_CHUNK_BYTES:
                offset = -(-offset // PIN_CHUNK_BYTES) * PIN_CHUNK_BYTES
            tiles.append(Tile(first, elements, offset, scales_at, size))
            offset += _aligned(size)
        layout.append(tiles)
    return layout, offset


class HostStore:
    """The loaded store. ``tensor``: uint8, all of it; ``tiles[weight]``: where each weight lies."""

    def __init__(self, store: Store, shared: SharedMemory, unpin: Callable[[], None]) -> None:
        self.store = store
        self.tiles, self.size_bytes = lay_out(store.weights)
        self.tensor = shared.tensor
        self._shared, self._unpin = shared, unpin

    @classmethod
    def load(cls, store: Store, memory: Memory, keep_name: str | None = None) -> HostStore:
        """Read the store into shared memory, verify its checksums, pin it.

        ``keep_name``: its name in /dev/shm if it is to outlive this process.
        Raises StoreCorruptError, naming the weight, and MemoryShortageError.
        """
        tiles, size_bytes = lay_out(store.weights)
        if keep_name:
            shared = SharedMemory.create_named(size_bytes, keep_name + ".partial")
        else:
            shared = SharedMemory.create(size_bytes, "store")
        try:
            _read(store, tiles, shared.tensor)
            unpin = memory.pin(shared.tensor)
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
        """The host store that a former feeder left under ``keep_name``, or None if it left none."""
        _, size_bytes = lay_out(store.weights)
        try:
            shared = SharedMemory.open(str(SHM_DIRECTORY / keep_name), size_bytes, writable=True)
        except (OSError, PeerError):
            return None
        return cls(store, shared, memory.pin(shared.tensor))

    def close(self) -> None:
        self._unpin()
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self._shared.close()

    def codes(self, weight: int, tile: Tile) -> torch.Tensor:
        """The tile's codes, uint8 [ceil(elements / 2)], in host memory."""
        return self.tensor[tile.offset_bytes :][: code_bytes(tile.elements)]

    def scales(self, weight: int, tile: Tile) -> torch.Tensor:
        """The tile's scales, bf16 [ceil(elements / 128)], in host memory."""
        start = tile.offset_bytes + tile.scales_at
        return self.tensor[start:][: 2 * scale_count(tile.elements)].view(torch.bfloat16)


def _read(store: Store, layout: list[list[Tile]], destination: torch.Tensor) -> None:
    """All weights, in parallel: each is read once, straight into place, and checked there."""

    def read(index: int) -> int:
        entry = store.weights[index]
        codes, scales = store.read_weight(entry)
        store.check(entry, codes, scales)
        for tile in layout[index]:
            first = tile.first // 2
            size = code_bytes(tile.elements)
            destination[tile.offset_bytes :][:size].copy_(codes[first : first + size])
            first = tile.first // BLOCK
            count = scale_count(tile.elements)
            start = tile.offset_bytes + tile.scales_at
            place = destination[start:][: 2 * count].view(torch.bfloat16)
            place.copy_(scales[first : first + count])
        return entry.packed_bytes

    workers = min(16, len(os.sched_getaffinity(0)))
    with (
        progress(store.packed_bytes, "loading the store") as bar,
        ThreadPoolExecutor(workers, thread_name_prefix="load") as pool,
    ):
        try:
            for size in pool.map(read, range(len(store.weights))):
                bar.update(size)
        except StoreCorruptError as error:
            pool.shutdown(cancel_futures=True)
            log.debug("loading stopped: %s", error)
            raise
