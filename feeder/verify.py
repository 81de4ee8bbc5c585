"""Verify mode, the feeder's side: what every slot must hold, and that it does."""

from __future__ import annotations

import torch

from common import int4
from common.errors import SlotCorruptError
from common.slots import Slot
from common.verify import poison, slot_checksum
from feeder.host import HostStore


class Verifier:
    """Compares slots with the reference dequantization of the host store."""

    def __init__(self, host: HostStore, dtype: torch.dtype) -> None:
        self._host, self._dtype = host, dtype
        self._expected: dict[int, int] = {}  # weight -> checksum

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
        """The checksum of the weight's reference dequantization; computed at the first use."""
        if weight not in self._expected:
            entry = self._host.store.weights[weight]
            values = torch.empty(entry.elements, dtype=self._dtype)
            for tile in self._host.tiles[weight]:
                codes, scales = self._host.codes(weight, tile), self._host.scales(weight, tile)
                part = int4.dequantize(codes, scales, (tile.elements,), self._dtype)
                values[tile.first :][: tile.elements] = part
            self._expected[weight] = slot_checksum(values.view(torch.uint8))
        return self._expected[weight]
