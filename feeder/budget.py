"""How large the arena is: what was asked, what the plan needs, what the device has. No allocation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.config import Cache, format_bytes
from common.errors import MemoryShortageError, StrategyError
from common.formats import DEQUANTIZED, FORMATS, PACKED, packable, slot_bytes
from common.plan import Capacity, Plan
from common.store import Store
from feeder.arena import aligned
from feeder.strategies.base import Strategy

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Request:
    """What the user asked for, before the device has been looked at."""

    plan: Plan
    sizes: Sequence[int]
    names: Sequence[str]
    cache: Cache

    def capacity(
        self, strategy: Strategy, free_bytes: int, has: str = "the device has", short: str = ""
    ) -> tuple[Capacity, str | None]:
        """The capacity, never more than was asked, and one line if it had to be cut to what is free.

        ``has``: what bounds ``free_bytes``, as a line can say it. MemoryShortageError, saying how
        much is needed (``short``, if the caller knows it better), where not even one weight fits.
        """
        total = len(self.sizes)
        count = min(self.cache.count or total, total)
        everything = sum(self.sizes)
        if self.cache.size_bytes is not None:
            asked = min(self.cache.size_bytes, everything)
        else:
            asked = min(max(self._arena_bytes(strategy, count), *self.sizes), everything)
        largest = max(range(total), key=lambda weight: self.sizes[weight])
        need = (
            f"the largest weight, {self.names[largest]}, needs {format_bytes(self.sizes[largest])}"
            f" ({self.sizes[largest]:,} bytes) in a slot"
        )
        if asked < self.sizes[largest]:
            raise MemoryShortageError(
                f"cache {self.cache} holds not even one weight: {need}: give at least that much"
            )
        if free_bytes < self.sizes[largest]:
            raise MemoryShortageError(
                short
                or f"{format_bytes(max(0, free_bytes))} of device memory can be used for slots: {need}:"
                " free device memory, or use another device"
            )
        if asked > free_bytes and self.cache.auto:
            return Capacity(count, free_bytes), None
        if asked > free_bytes:
            return Capacity(count, free_bytes), (
                f"cache {self.cache} would take {format_bytes(asked)}; {has}"
                f" {format_bytes(free_bytes)} for slots: cut to that"
            )
        return Capacity(count, asked), None

    def copies(
        self, strategy: Strategy, capacity: Capacity, packed_sizes: Sequence[int]
    ) -> frozenset[int]:
        """Weights of which the strategy wants packed copies on the device, in the capacity's bytes.

        ``packed_sizes``: of the copies, by weight. StrategyError if the answer makes no sense.
        """
        try:
            answer = strategy.copies(self.plan, self.sizes, packed_sizes, capacity.size_bytes)
        except (Exception, SystemExit) as error:
            raise StrategyError(f"{strategy.name}: copies raises {error!r}: mend it") from error
        total = len(self.sizes)
        if not isinstance(answer, frozenset) or not all(
            type(weight) is int and 0 <= weight < total for weight in answer
        ):
            raise StrategyError(
                f"{strategy.name}: copies gives {answer!r:.100}, not a frozenset of weights"
            )
        left = capacity.size_bytes - sum(packed_sizes[weight] for weight in answer)
        if left < max(self.sizes):
            raise StrategyError(
                f"{strategy.name}: copies leaves {left:,} bytes for slots, and the largest weight"
                f" needs {max(self.sizes):,}"
            )
        return answer

    def _arena_bytes(self, strategy: Strategy, count: int) -> int:
        """What the strategy says; it may be a user's own."""
        try:
            answer = strategy.arena_bytes(self.plan, self.sizes, count)
        except (Exception, SystemExit) as error:
            raise StrategyError(
                f"{strategy.name}: arena_bytes raises {error!r}: mend it"
            ) from error
        if type(answer) is not int:
            raise StrategyError(
                f"{strategy.name}: arena_bytes gives {answer!r}, not a whole number"
            )
        return answer


def slot_formats(store: Store, slots: str, strategy: Strategy) -> list[str]:
    """What each weight is in its slot, by weight: ``slots`` ("dequantized", "packed", or "auto"), unless
    the strategy says otherwise of it, or it cannot be multiplied with packed. StrategyError if the
    strategy names no format."""
    usual = DEQUANTIZED if slots == DEQUANTIZED else PACKED
    formats = []
    for weight, entry in enumerate(store.weights):
        try:
            chosen = strategy.slot_format(weight, usual)
        except (Exception, SystemExit) as error:
            raise StrategyError(
                f"{strategy.name}: slot_format raises {error!r}: mend it"
            ) from error
        if chosen not in FORMATS:
            raise StrategyError(
                f"{strategy.name}: slot_format gives {chosen!r}, expected {' or '.join(FORMATS)}"
            )
        formats.append(chosen if packable(entry.shape) else DEQUANTIZED)
    return formats


def slot_sizes(store: Store, dtype: torch.dtype, formats: Sequence[str]) -> list[int]:
    """Bytes of each weight in its slot, by weight."""
    return [
        aligned(slot_bytes(slot_format, entry.elements, dtype.itemsize))
        for entry, slot_format in zip(store.weights, formats, strict=True)
    ]
