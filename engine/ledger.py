"""What the feeder has lent: mappings of its segments, and leases of its slots. Bookkeeping only.

Guarded by its owner's lock; knows no sockets and no streams. A mapping goes only when nothing can
read it any more, also when the feeder that made it is dead: the memory of a dead exporter stays
readable under a living mapping.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from common import protocol as p
from common.blocks import code_bytes, scales_offset
from common.formats import PACKED
from common.memory import Segment
from engine.packed_weight import Packed

MAX_VIEWS = 4096  # tensors of slots that a mapping keeps; making one takes as long as a launch


@dataclass(eq=False)
class Mapping:
    """A mapped segment. ``users``: leases in it that have not been returned."""

    id: int
    segment: Segment
    users: int = 0
    views: dict[tuple[int, object, tuple[int, ...]], Any] = field(default_factory=dict)
    orphaned: bool = False  # the feeder that lent it is gone


@dataclass(eq=False)
class Lease:
    """A grant as the engine holds it."""

    grant: p.Grant
    mapping: Mapping
    readers: int = 0  # between acquire and release
    recalled: bool = False  # revoked, or its feeder is gone: return it when nobody reads it
    returning: bool = False

    @property
    def data(self) -> torch.Tensor:
        """The slot's bytes, uint8."""
        return self.mapping.segment.tensor[self.grant.offset_bytes :][: self.grant.size_bytes]

    def weight(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The dequantized weight in the slot, ``shape`` [N, K] of ``dtype``; no copy."""

        def view() -> torch.Tensor:
            return self.data.view(dtype).view(shape)

        found: torch.Tensor = self._kept((self.grant.offset_bytes, dtype, shape), view)
        return found

    def packed(self, shape: tuple[int, int]) -> Packed:
        """The packed weight in the slot, of ``shape`` [N, K]; no copy."""

        def view() -> Packed:
            elements, data = shape[0] * shape[1], self.data
            scales = data[scales_offset(elements) :].view(torch.bfloat16)
            return Packed(data[: code_bytes(elements)], scales, shape)

        found: Packed = self._kept((self.grant.offset_bytes, PACKED, shape), view)
        return found

    def _kept(self, key: tuple[int, object, tuple[int, ...]], make: Callable[[], Any]) -> Any:
        views = self.mapping.views
        view = views.get(key)
        if view is None:
            if len(views) >= MAX_VIEWS:
                views.clear()
            view = views[key] = make()
        return view


class Ledger:
    """Leases by weight and by slot, mappings by segment."""

    def __init__(self) -> None:
        self._offered: dict[int, Lease] = {}  # by weight: granted and not taken, or standing
        self._held: dict[int, Lease] = {}  # by weight: being read
        self._by_slot: dict[int, Lease] = {}
        self._mappings: dict[int, Mapping] = {}
        self._going: list[Mapping] = []
        self._last_segment = -1  # segments are numbered in the order in which they are exported
        self._generations: dict[int, int] = {}  # by slot: of its last grant

    def expects(self, segment_id: int) -> bool:
        """Whether a segment of that number is new: it has not been mapped, nor retired."""
        return segment_id > self._last_segment

    def add(self, segment_id: int, segment: Segment) -> None:
        """A segment of the feeder's has been mapped."""
        self._last_segment = segment_id
        self._mappings[segment_id] = Mapping(segment_id, segment)

    def grant(self, grant: p.Grant) -> bool:
        """Note a grant; False if it is an old one that is repeated, or names a segment, an extent or
        a slot that cannot be."""
        mapping = self._mappings.get(grant.segment)
        end = grant.offset_bytes + grant.size_bytes
        if mapping is None or end > mapping.segment.size_bytes:
            return False
        if grant.slot in self._by_slot or grant.weight in self._offered:
            return False
        if grant.generation <= self._generations.get(grant.slot, -1):
            return False
        self._generations[grant.slot] = grant.generation
        lease = Lease(grant, mapping)
        mapping.users += 1
        self._offered[grant.weight] = self._by_slot[grant.slot] = lease
        return True

    def take(self, weight: int) -> Lease | None:
        """The lease of ``weight`` for one more reader, if it is granted, or being read: who holds a
        weight and asks for it again (in a debugger, say) would else wait for himself."""
        lease = self._offered.get(weight)
        if lease is None:
            lease = self._held.get(weight)
            if lease is None:
                return None
        elif lease.recalled or not lease.grant.standing:
            del self._offered[weight]
        lease.readers += 1
        self._held[weight] = lease
        return lease

    def take_all(self, weights: Sequence[int]) -> list[Lease] | None:
        """The leases of all of them, or None and nothing is taken."""
        if not all(weight in self._offered or weight in self._held for weight in weights):
            return None
        return [lease for weight in weights if (lease := self.take(weight)) is not None]

    def standing(self, weights: Sequence[int]) -> bool:
        """Whether all of them are granted until they are revoked."""
        found = (self._offered.get(weight) for weight in weights)
        return all(lease is not None and lease.grant.standing for lease in found)

    def put(self, lease: Lease) -> bool:
        """A reader is done; whether the lease is to be returned when its kernels are complete."""
        lease.readers -= 1
        if lease.readers:
            return False
        if self._held.get(lease.grant.weight) is lease:
            del self._held[lease.grant.weight]
        if lease.grant.standing and not lease.recalled:
            return False
        lease.returning = True
        return True

    def returning(self, weight: int) -> bool:
        """Whether a lease of ``weight`` waits for its kernels, so that its feeder knows nothing yet."""
        return any(x.returning and x.grant.weight == weight for x in self._by_slot.values())

    def recall(self, slot: int, generation: int, wanted: Container[int]) -> Lease | None:
        """The feeder asks for a grant back: the lease, if it is to be returned now.

        One that is being read is returned by its ``put``; so is one that a reader waits for
        (``wanted``), who is about to take it.
        """
        lease = self._by_slot.get(slot)
        if lease is None or lease.grant.generation != generation:
            return None
        if lease.grant.weight in wanted and not lease.readers:
            lease.recalled = True
            return None
        return self._recall(lease)

    def returned(self, lease: Lease) -> bool:
        """Nothing reads the lease any more; whether its feeder is still there to be told."""
        lease.mapping.users -= 1
        if self._by_slot.get(lease.grant.slot) is not lease:
            return False
        del self._by_slot[lease.grant.slot]
        return True

    def lose(self) -> list[Lease]:
        """The feeder is gone: the leases to be returned now, to nobody, so that mappings can go."""
        leases = [lease for lease in self._by_slot.values() if not lease.returning]
        self._by_slot.clear()
        self._held.clear()  # they are read to their end; for another reader, the next feeder is asked
        idle = [lease for lease in map(self._recall, leases) if lease is not None]
        self._going.extend(self._mappings.values())
        for mapping in self._going:  # those that it retired before, too: the next one knows nothing
            mapping.orphaned = True
        self._mappings.clear()
        self._last_segment = -1
        self._generations.clear()
        return idle

    def retire(self, segment_id: int) -> None:
        """The segment is to be unmapped as soon as nothing reads it."""
        mapping = self._mappings.pop(segment_id, None)
        if mapping is not None:
            self._going.append(mapping)

    def unmap_idle(self) -> list[int]:
        """Close every going mapping that nothing reads; the segments to report to their feeder."""
        idle = [mapping for mapping in self._going if not mapping.users]
        for mapping in idle:
            self._going.remove(mapping)
            mapping.views.clear()
            mapping.segment.close()
        return [mapping.id for mapping in idle if not mapping.orphaned]

    def close(self) -> None:
        """Unmap everything. All kernels must be complete."""
        for mapping in [*self._mappings.values(), *self._going]:
            mapping.segment.close()

    def _recall(self, lease: Lease) -> Lease | None:
        lease.recalled = True
        if self._offered.get(lease.grant.weight) is lease:
            del self._offered[lease.grant.weight]
        if lease.readers or lease.returning:
            return None
        lease.returning = True
        return lease
