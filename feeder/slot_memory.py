"""The segment in which all slots lie, and how large it is. Knows no peers and no strategy's inside."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from common import protocol as p
from common.blocks import packed_span
from common.config import Cache, format_bytes
from common.errors import WeightFeederError
from common.formats import DEQUANTIZED, PACKED, slot_bytes
from common.log import log
from common.memory import PAGE_BYTES, Memory, Segment
from common.plan import Capacity, Plan
from common.process import ENGINE_LOCK, MODEL_LOCK, Lock
from common.store import Store
from feeder.arena import aligned
from feeder.budget import Request, slot_formats, slot_sizes
from feeder.draft_memory import SEGMENT, DraftMemory
from feeder.footprint import Footprint, Limits, Room, footprints, slot_room
from feeder.strategies.base import Strategy
from feeder.strategies.resident import spread

MAX_VIEWS = 4096  # tensors of slots that are kept; making one takes as long as a launch


class Beside(Protocol):
    """What allocates beside the slots: the filler."""

    def use_staging(self, on: bool) -> None: ...

    def use_copies(self, weights: Collection[int]) -> None: ...


@dataclass(frozen=True)
class Share:
    """How the memory for slots is used: the slots, and the weights of which a packed copy stays."""

    capacity: Capacity
    copies: frozenset[int] = frozenset()


class SlotMemory:
    """One segment at a time. ``formats`` and ``sizes``: what each weight is in a slot, and its bytes;
    ``cache`` and ``slots``: what was asked; ``copies``: weights of which the filler keeps a packed copy;
    ``footprint``: what is left to all that is neither."""

    def __init__(
        self,
        store: Store,
        memory: Memory,
        dtype: torch.dtype,
        directory: Path,
        cache: Cache,
        strategy: Strategy,
        slots: str,
        beside: Beside,
        limits: Limits | None = None,
        draft: DraftMemory | None = None,
    ) -> None:
        """``beside`` is told, before memory is shared out, whether slots are to be dequantized into, and
        then of which weights it may keep copies. It allocates in ``memory``, and nobody else does, but
        for the ``draft`` that is there already.

        Raises MemoryShortageError where not even one weight fits.
        """
        self.store, self.memory, self.dtype, self.cache = store, memory, dtype, cache
        self.slots = slots
        self._beside = beside
        self._directory, self._limits = directory, limits or Limits()
        self._given_bytes = 0  # to the engine, beyond its share
        self.draft = draft
        self.formats = slot_formats(store, slots, strategy)
        self.sizes = slot_sizes(store, dtype, self.formats)
        self.plan = Plan(tuple(range(len(store.weights))))
        self._stage(self.formats)
        self.footprint = self._choose_footprint()
        share = self.fitting(strategy, cache, self.formats)
        self.capacity, self.copies = share.capacity, share.copies
        self.segment_id = SEGMENT + 1
        self._destinations: dict[tuple[int, int], torch.Tensor] = {}  # by weight and offset
        self._segment: Segment = self._allocate()

    def fitting(
        self, strategy: Strategy, cache: Cache, formats: Sequence[str], instead: bool = False
    ) -> Share:
        """What ``cache`` comes to on this device now. MemoryShortageError if that is not one weight.

        ``formats``: of the slots, by weight; ``instead``: as if what there is now were given up for it.
        """
        free = self.memory.free_bytes()
        if instead:
            free += self._segment.size_bytes + self.copies_bytes(self.copies)
        room = self._room(replace(self.footprint, staging=self._staging_bytes), free)
        names = [weight.name for weight in self.store.weights]
        sizes = slot_sizes(self.store, self.dtype, formats)
        largest = max(range(len(names)), key=lambda weight: sizes[weight])
        short = room.shortage(sizes[largest], names[largest])
        request = Request(self.plan, sizes, names, cache)
        capacity, cut = request.capacity(strategy, room.size_bytes, room.has, short)
        if cut and not instead:
            log.warning("%s", cut)
        near = self.memory.device.type == "cpu" or PACKED in formats
        if near or (cache.count is not None and cut is None):
            return Share(capacity)
        size = capacity.size_bytes - PAGE_BYTES  # copies take whole pages
        if size < max(sizes) or capacity.size_bytes >= sum(sizes):
            return Share(capacity)
        to_share = Capacity(capacity.count, size)
        copies = request.copies(strategy, to_share, list(map(self._copy_bytes, self.plan.order)))
        if not copies:
            return Share(capacity)
        rest = capacity.size_bytes - self.copies_bytes(copies)
        return Share(Capacity(capacity.count, rest), copies)

    def _copy_bytes(self, weight: int) -> int:
        return aligned(packed_span(self.store.weights[weight].elements))

    def copies_bytes(self, copies: Collection[int]) -> int:
        """What such copies take together, in whole pages."""
        size = sum(map(self._copy_bytes, copies))
        return -(-size // PAGE_BYTES) * PAGE_BYTES

    def _allocate(self) -> Segment:
        """The segment of the slots, and the copies."""
        self._beside.use_copies(self.copies)
        return self.memory.allocate(self.capacity.size_bytes)

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
        """There is no segment now but a draft's: all else that is allocated is the staging, and copies
        that go."""
        self._beside.use_copies(())
        self._beside.use_staging(DEQUANTIZED in formats)
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
        # Slots may take less than there is room for: what they leave is the engine's.
        footprint = self.footprint
        has = self._segment.size_bytes + self.copies_bytes(self.copies)
        rest = self._limits.vram_bytes - (footprint.total - footprint.engine_bytes) - has
        return max(footprint.engine_bytes + self._given_bytes, rest)

    def data(self, weight: int, offset_bytes: int) -> torch.Tensor:
        """The bytes, uint8, of ``weight`` in the slot that begins at ``offset_bytes``."""
        return self._segment.tensor[offset_bytes:][: self.weight_bytes(weight)]

    def destination(self, weight: int, offset_bytes: int) -> torch.Tensor:
        """The same as a fill writes it: bytes if it is packed there, else elements of the dtype."""
        key = weight, offset_bytes
        found = self._destinations.get(key)
        if found is None:
            if len(self._destinations) >= MAX_VIEWS:
                self._destinations.clear()
            found = self.data(weight, offset_bytes)
            if self.formats[weight] != PACKED:
                found = found.view(self.dtype)
            self._destinations[key] = found
        return found

    def weight_bytes(self, weight: int) -> int:
        """What the weight takes in a slot, less the padding."""
        elements = self.store.weights[weight].elements
        return slot_bytes(self.formats[weight], elements, self.dtype.itemsize)

    def export(self) -> p.Export:
        """What an engine needs to map the segment."""
        segment = self._segment
        packed = PACKED in self.formats
        return p.Export(
            self.segment_id, segment.kind, segment.size_bytes, segment.handle, packed,
            self.engine_bytes,
        )  # fmt: skip

    def replace(self, strategy: Strategy, cache: Cache, slots: str, formats: list[str]) -> str:
        """A segment for another cache, or other ``formats``; no slot may be in use. "" or why it stayed
        as it was."""
        self._free()
        self.segment_id += 1
        former = self.formats, self.sizes, self.footprint, self.capacity, self.copies
        try:
            self.formats = formats
            self.sizes = slot_sizes(self.store, self.dtype, self.formats)
            self._stage(self.formats)
            self.footprint = self._choose_footprint()
            share = self.fitting(strategy, cache, formats)
            self.capacity, self.copies = share.capacity, share.copies
            self._segment = self._allocate()
        except WeightFeederError as error:  # also of a strategy that answers otherwise now
            self.formats, self.sizes, self.footprint, self.capacity, self.copies = former
            self._stage(self.formats)
            self._segment = self._allocate()
            return f"{error}: cache and strategy stay as they were"
        self.cache, self.slots = cache, slots
        return ""

    def spare_bytes(self, size_bytes: int) -> int:
        """So many bytes of segment and copies, or as many as leave room for the largest weight."""
        has = self.capacity.size_bytes + self.copies_bytes(self.copies)
        return min(size_bytes, has - max(self.sizes))

    def shrink(self, size_bytes: int) -> None:
        """A segment, or copies, smaller by so many bytes, which are to be spare; no slot may be in use."""
        has = self.capacity.size_bytes + self.copies_bytes(self.copies)
        self._free()
        self.segment_id += 1
        # Copies go first: slots that are fewer would make the others wait.
        all_copies, copies = sorted(self.copies), self.copies
        rest = has - size_bytes
        while copies and rest - self.copies_bytes(copies) < self.capacity.size_bytes:
            copies = spread(all_copies, len(copies) - 1)
        self.copies = copies
        slots = min(self.capacity.size_bytes, rest - self.copies_bytes(copies))
        self.capacity = Capacity(self.capacity.count, slots)
        self._segment = self._allocate()
        self._given_bytes += size_bytes
        log.warning(
            "the engine is short of device memory: slots shrink from %s to %s",
            format_bytes(has), format_bytes(rest),
        )  # fmt: skip

    def close(self) -> None:
        self._free()

    def _free(self) -> None:
        self._destinations.clear()
        self._segment.close()
