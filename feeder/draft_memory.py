"""A draft model's weights: one segment of their own, filled before anybody is served, and lent for good.

Owns that segment. Knows no strategy, no scheduler and no state of a slot: nothing in it is ever evicted
or asked back, so an engine has all of them or, when its feeder is gone, none.
docs/decisions/0009-draft.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from common import int4
from common import protocol as p
from common.blocks import packed_span, scales_offset
from common.config import format_bytes
from common.dequantize import dequantize_into
from common.errors import MemoryShortageError, SlotCorruptError
from common.formats import DEQUANTIZED, PACKED, packable, slot_bytes
from common.memory import Memory, Segment
from common.store import Store, WeightEntry
from common.verify import slot_checksum
from feeder.budget import slot_sizes
from feeder.footprint import DraftPart

#: Slots of a draft are numbered from here on, those of the model from 0.
FIRST_SLOT = 1 << 32
SEGMENT = 0  # the model's segments have higher numbers


class DraftMemory:
    """``first_weight``: the index of the draft's first weight, the number of the model's weights."""

    def __init__(
        self,
        store: Store,
        memory: Memory,
        dtype: torch.dtype,
        first_weight: int,
        verify: bool = False,
    ) -> None:
        """Raises MemoryShortageError, and StoreCorruptError for a damaged weight."""
        self.store, self._memory, self._dtype = store, memory, dtype
        self._first_weight, self._verify = first_weight, verify
        # Small products on the CPU would spend their time dequantizing; memory is not what is short.
        on_device = memory.device.type == "cuda"
        self._formats = [
            PACKED if on_device and packable(entry.shape) else DEQUANTIZED
            for entry in store.weights
        ]
        sizes = slot_sizes(store, dtype, self._formats)
        self._offsets = [sum(sizes[:weight]) for weight in range(len(sizes))]
        self._sizes = [
            slot_bytes(kind, entry.elements, dtype.itemsize)
            for kind, entry in zip(self._formats, store.weights, strict=True)
        ]
        self._checksums = [0] * len(sizes)
        self._generation = int.from_bytes(os.urandom(4), "big")
        before = memory.allocated
        try:
            self._segment = self._allocate(sum(sizes))
            #: Of what ``memory`` counts as allocated.
            self.allocated_bytes = memory.allocated - before
            self._fill_all()
        finally:
            store.close()  # its files are not read again

    @property
    def size_bytes(self) -> int:
        """What its slots take of the device."""
        return self._segment.size_bytes

    @property
    def part(self) -> DraftPart:
        """What it is to a footprint."""
        return DraftPart(self.store, self.size_bytes, PACKED in self._formats)

    def messages(self, engine_bytes: int) -> Iterator[p.Message]:
        """All that a new engine has to be told. ``engine_bytes``: what it may allocate, as every export
        says. SlotCorruptError in verify mode, if a slot has changed."""
        segment = self._segment
        yield p.Export(
            SEGMENT,
            segment.kind,
            segment.size_bytes,
            segment.handle,
            self.part.packed,
            engine_bytes,
        )
        self._generation += 1
        for weight, kind in enumerate(self._formats):
            yield p.Grant(
                weight=self._first_weight + weight, slot=FIRST_SLOT + weight,
                generation=self._generation, segment=SEGMENT, offset_bytes=self._offsets[weight],
                size_bytes=self._sizes[weight], format=kind, standing=True,
                checksum=self._check(weight),
            )  # fmt: skip

    def close(self) -> None:
        self._segment.close()

    def _allocate(self, size_bytes: int) -> Segment:
        free_bytes = self._memory.free_bytes()
        if size_bytes > free_bytes:
            raise MemoryShortageError(
                f"the draft model {self.store.path.name} needs {format_bytes(size_bytes)} of slots and"
                f" {format_bytes(free_bytes)} are free: take a smaller one, or go without"
            )
        return self._memory.allocate(size_bytes)

    def _data(self, weight: int) -> torch.Tensor:
        return self._segment.tensor[self._offsets[weight] :][: self._sizes[weight]]

    def _fill_all(self) -> None:
        try:
            for weight in range(len(self._sizes)):
                self._fill(weight)
            if self._memory.device.type == "cuda":
                torch.cuda.synchronize(self._memory.device)
                torch.cuda.empty_cache()  # what the filling took is for the model's slots
        except BaseException:
            self.close()
            raise

    def _fill(self, weight: int) -> None:
        entry = self.store.weights[weight]
        codes, scales = self.store.read_weight(entry)
        self.store.check(entry, codes, scales)
        if self._formats[weight] == PACKED:
            source = _as_packed(entry, codes, scales)
            self._data(weight).copy_(source)
        else:
            device, dtype = self._memory.device, self._dtype
            there = codes.to(device, copy=True), scales.to(device, copy=True)  # aligned
            dequantize_into(*there, self._data(weight).view(dtype))
            if self._verify:
                source = int4.dequantize(codes, scales, entry.shape, dtype).view(-1)
        if self._verify:
            self._checksums[weight] = slot_checksum(source.view(torch.uint8))

    def _check(self, weight: int) -> int:
        """In verify mode: the slot's checksum, which is what it must be."""
        if not self._verify:
            return 0
        found = slot_checksum(self._data(weight))
        if found != self._checksums[weight]:
            raise SlotCorruptError(
                f"verify at grant: {self.store.weights[weight].name} of the draft model has checksum"
                f" {found:x}, expected {self._checksums[weight]:x}: something wrote to the slot, or"
                " the memory is faulty"
            )
        return found


def _as_packed(entry: WeightEntry, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The bytes of a packed slot."""
    data = torch.zeros(packed_span(entry.elements), dtype=torch.uint8)
    data[: codes.numel()] = codes
    data[scales_offset(entry.elements) :] = scales.view(torch.uint8)
    return data
