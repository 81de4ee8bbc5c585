"""Verify mode, the feeder's side: what every slot must hold, and that it does."""

from __future__ import annotations

import torch

from common import int4
from common.errors import SlotCorruptError
from common.formats import PACKED
from common.slots import Slot
from common.verify import poison, slot_checksum
from feeder.host import HostStore
from feeder.slot_memory import SlotMemory


class Verifier:
    """Compares slots with the host store, or with its reference dequantization."""

    def __init__(self, host: HostStore, slots: SlotMemory) -> None:
        self._host, self._slots = host, slots
        self._expected: dict[tuple[int, str], int] = {}  # (weight, format) -> checksum

    def check(self, slot: Slot, data: torch.Tensor, moment: str) -> int:
        """The checksum of ``data`` (the slot's bytes, uint8).

        SlotCorruptError, naming weight, slot and generation, if it is not what it must be.
        """
        found, expected = slot_checksum(data), self.expected(slot.weight)
        if found != expected:
            name = self._host.store.weights[slot.weight].name
            raise SlotCorruptError(
                f"verify at {moment}: {name} in slot {slot.id}, generation {slot.generation}, has"
                f" checksum {found:x}, expected {expected:x}: something wrote to the slot, or the"
                " memory is faulty"
            )
        return found

    def freed(self, data: torch.Tensor) -> None:
        """Poison a slot that nobody may read any more, before it is filled again."""
        poison(data)
        if data.is_cuda:
            torch.cuda.synchronize(data.device)  # the next fill runs on another stream

    def expected(self, weight: int) -> int:
        """The checksum of what the weight's slot must hold; computed at the first use."""
        kind = self._slots.formats[weight]
        if (weight, kind) not in self._expected:
            if kind == PACKED:
                data = self._host.packed(weight)
            else:
                elements = self._host.places[weight].elements
                codes, scales = self._host.codes(weight), self._host.scales(weight)
                values = int4.dequantize(codes, scales, (elements,), self._slots.dtype)
                data = values.view(torch.uint8)
            self._expected[weight, kind] = slot_checksum(data)
        return self._expected[weight, kind]
