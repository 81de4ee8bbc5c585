"""The segment in which all slots lie, and how large it is. Knows no peers and no strategy's inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from common import protocol as p
from common.config import Cache, format_bytes
from common.errors import WeightFeederError
from common.formats import DEQUANTIZED, PACKED, slot_bytes
from common.log import log
from common.memory import PAGE_BYTES, Memory, Segment
from common.plan import Capacity, Plan
from common.process import ENGINE_LOCK, MODEL_LOCK, Lock
from common.store import Store
from feeder.budget import Request, slot_formats, slot_sizes
from feeder.draft_memory import SEGMENT, DraftMemory
from feeder.footprint import Footprint, Limits, Room, footprints, slot_room
from feeder.strategies.base import Strategy


class SlotMemory:
    """One segment at a time. ``formats`` and ``sizes``: what each weight is in a slot, and its bytes;
    ``cache`` and ``slots``: what was asked; ``footprint``: what is left to all that is not slots."""

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
        limits: Limits | None = None,
        draft: DraftMemory | None = None,
    ) -> None:
        """``staging`` is told, before memory is shared out, whether slots are to be dequantized into.
        It allocates in ``memory``, and nobody else does, but for the ``draft`` that is there already.

        Raises MemoryShortageError where not even one weight fits.
        """
        self.store, self.memory, self.dtype, self.cache = store, memory, dtype, cache
        self.slots = slots
        self._staging = staging
        self._directory, self._limits = directory, limits or Limits()
        self._given_bytes = 0  # to the engine, beyond its share
        self.draft = draft
        self.formats = slot_formats(store, slots, strategy)
        self.sizes = slot_sizes(store, dtype, self.formats)
        self.plan = Plan(tuple(range(len(store.weights))))
        self._stage(self.formats)
        self.footprint = self._choose_footprint()
        self.capacity = self.fitting(strategy, cache, self.formats)
        self.segment_id = SEGMENT + 1
        self._segment: Segment = memory.allocate(self.capacity.size_bytes)

    def fitting(
        self, strategy: Strategy, cache: Cache, formats: Sequence[str], instead: bool = False
    ) -> Capacity:
        """What ``cache`` comes to on this device now. MemoryShortageError if that is not one weight.

        ``formats``: of the slots, by weight; ``instead``: as if the present segment were given up for it.
        """
        free = self.memory.free_bytes() + (self._segment.size_bytes if instead else 0)
        room = self._room(replace(self.footprint, staging=self._staging_bytes), free)
        names = [weight.name for weight in self.store.weights]
        sizes = slot_sizes(self.store, self.dtype, formats)
        largest = max(range(len(names)), key=lambda weight: sizes[weight])
        short = room.shortage(sizes[largest], names[largest])
        request = Request(self.plan, sizes, names, cache)
        capacity, cut = request.capacity(strategy, room.size_bytes, room.has, short)
        if cut and not instead:
            log.warning("%s", cut)
        return capacity

    def _choose_footprint(self) -> Footprint:
        """With passes as long as they can be if at least the largest weight is to have a slot."""
        memory, free_bytes = self.memory, self.memory.free_bytes()
        choices = footprints(
            self.store, self.dtype, memory.device, self._limits, self._staging_bytes,
            packed=PACKED in self.formats, draft=self.draft.part if self.draft else None,
        )  # fmt: skip
        for footprint in choices:
            if self._room(footprint, free_bytes).size_bytes >= max(self.sizes):
                break
        return footprint

    def _stage(self, formats: list[str]) -> None:
        """There is no segment now but a draft's: all else that is allocated is the staging."""
        self._staging(DEQUANTIZED in formats)
        self._staging_bytes = self.memory.allocated
        if self.draft is not None:
            self._staging_bytes -= self.draft.allocated_bytes

    def _room(self, footprint: Footprint, free_bytes: int) -> Room:
        if Lock.holder(self._directory / ENGINE_LOCK) is None:
            self._given_bytes = 0  # the engine that got them is gone
        engine_runs = Lock.holder(self._directory / MODEL_LOCK) is not None
        room = slot_room(footprint, self._limits, free_bytes, engine_runs, self._given_bytes)
        if self.memory.device.type == "cpu":
            return room
        pages = room.size_bytes // PAGE_BYTES  # an allocation is of whole pages
        return replace(room, size_bytes=pages * PAGE_BYTES)

    @property
    def engine_bytes(self) -> int:
        """What the engine may allocate for itself; 0 for whatever is free."""
        if self._limits.vram_bytes is None:
            return 0
        return self.footprint.engine_bytes + self._given_bytes

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
        packed = PACKED in self.formats
        return p.Export(self.segment_id, segment.kind, segment.size_bytes, segment.handle, packed)

    def replace(self, strategy: Strategy, cache: Cache, slots: str, formats: list[str]) -> str:
        """A segment for another cache, or other ``formats``; no slot may be in use. "" or why it stayed
        as it was."""
        self._segment.close()
        self.segment_id += 1
        former = self.formats, self.sizes, self.footprint
        try:
            self.formats = formats
            self.sizes = slot_sizes(self.store, self.dtype, self.formats)
            self._stage(self.formats)
            self.footprint = self._choose_footprint()
            capacity = self.fitting(strategy, cache, formats)
            self._segment = self.memory.allocate(capacity.size_bytes)
        except WeightFeederError as error:  # also of a strategy that answers otherwise now
            self.formats, self.sizes, self.footprint = former
            self._stage(self.formats)
            self._segment = self.memory.allocate(self.capacity.size_bytes)
            return f"{error}: cache and strategy stay as they were"
        self.capacity, self.cache, self.slots = capacity, cache, slots
        return ""

    def spare_bytes(self, size_bytes: int) -> int:
        """So many bytes of the segment, or as many as leave room for the largest weight."""
        return min(size_bytes, self.capacity.size_bytes - max(self.sizes))

    def shrink(self, size_bytes: int) -> None:
        """A segment that is smaller by so many bytes, which are to be spare; no slot may be in use."""
        has = self.capacity.size_bytes
        smaller = has - size_bytes
        self._segment.close()
        self.segment_id += 1
        self._segment = self.memory.allocate(smaller)
        self.capacity = Capacity(self.capacity.count, smaller)
        self._given_bytes += size_bytes
        log.warning(
            "the engine is short of device memory: slots shrink from %s to %s",
            format_bytes(has), format_bytes(smaller),
        )  # fmt: skip

    def close(self) -> None:
        self._segment.close()
