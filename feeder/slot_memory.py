"""The segment in which all slots lie, and how large it is. Knows no peers and no strategy's inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from common import protocol as p
from common.config import Cache
from common.errors import MemoryShortageError
from common.formats import DEQUANTIZED, slot_bytes
from common.log import log
from common.memory import Memory, Segment
from common.plan import Capacity, Plan
from common.process import MODEL_LOCK, Lock
from common.store import Store
from feeder.budget import Request, engine_reserve_bytes, slot_formats, slot_sizes
from feeder.strategies.base import Strategy


class SlotMemory:
    """One segment at a time. ``formats`` and ``sizes``: what each weight is in a slot, and its bytes;
    ``cache`` and ``slots``: what was asked."""

    def __init__(
        self,
        store: Store,
        memory: Memory,
        dtype: torch.dtype,
        directory: Path,
        cache: Cache,
        strategy: Strategy,
        slots: str,
        staging: Callable[[bool], None],
    ) -> None:
        """``staging`` is told, before memory is shared out, whether slots are to be dequantized into.

        Raises MemoryShortageError where not even one weight fits.
        """
        self.store, self.memory, self.dtype, self.cache = store, memory, dtype, cache
        self.slots = slots
        self._staging = staging
        self._directory = directory
        self.formats = slot_formats(store, slots, strategy)
        self.sizes = slot_sizes(store, dtype, self.formats)
        self.plan = Plan(tuple(range(len(store.weights))))
        staging(DEQUANTIZED in self.formats)
        self.capacity = self.fitting(strategy, cache, slots)
        self.segment_id = 0
        self._segment: Segment = memory.allocate(self.capacity.size_bytes)

    def fitting(
        self, strategy: Strategy, cache: Cache, slots: str, instead: bool = False
    ) -> Capacity:
        """What ``cache`` comes to on this device now. MemoryShortageError if that is not one weight.

        ``instead``: as if the present segment were given up for it.
        """
        engine_runs = Lock.holder(self._directory / MODEL_LOCK) is not None
        free = self.memory.free_bytes() + (self._segment.size_bytes if instead else 0)
        reserve = engine_reserve_bytes(self.store, self.memory.device, engine_runs)
        sizes = slot_sizes(self.store, self.dtype, slot_formats(self.store, slots, strategy))
        request = Request(self.plan, sizes, [w.name for w in self.store.weights], cache)
        capacity, cut = request.capacity(strategy, free - reserve)
        if cut and not instead:
            log.warning("%s", cut)
        return capacity

    def data(self, weight: int, offset_bytes: int) -> torch.Tensor:
        """The bytes, uint8, of ``weight`` in the slot that begins at ``offset_bytes``."""
        return self._segment.tensor[offset_bytes:][: self.weight_bytes(weight)]

    def weight_bytes(self, weight: int) -> int:
        """What the weight takes in a slot, less the padding."""
        elements = self.store.weights[weight].elements
        return slot_bytes(self.formats[weight], elements, self.dtype.itemsize)

    def export(self) -> p.Export:
        """What an engine needs to map the segment."""
        segment = self._segment
        return p.Export(self.segment_id, segment.kind, segment.size_bytes, segment.handle)

    def replace(self, strategy: Strategy, cache: Cache, slots: str) -> str:
        """A segment for another cache; no slot may be in use. "" or why it stayed as it was."""
        self._segment.close()
        self.segment_id += 1
        try:
            self._staging(DEQUANTIZED in slot_formats(self.store, slots, strategy))
            capacity = self.fitting(strategy, cache, slots)
            self._segment = self.memory.allocate(capacity.size_bytes)
        except MemoryShortageError as error:
            self._staging(DEQUANTIZED in self.formats)
            self._segment = self.memory.allocate(self.capacity.size_bytes)
            return f"{error}: cache and strategy stay as they were"
        self.capacity, self.cache, self.slots = capacity, cache, slots
        self.formats = slot_formats(self.store, slots, strategy)
        self.sizes = slot_sizes(self.store, self.dtype, self.formats)
        return ""

    def close(self) -> None:
        self._segment.close()
