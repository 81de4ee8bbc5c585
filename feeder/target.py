"""The target: the longest prefix of needs and wishes that the capacity holds. Knows no slots.

`Window` follows a cyclic strategy piece by piece: when the engine moves on by a weight, that weight
leaves and others enter, and nothing else is looked at. `Listed` is what any strategy answered at one
moment. Both say which weights are wanted (`members`), how urgently (`rank`), and what the strategy
goes on with (`beyond`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from common.plan import Capacity, Plan


class Window:
    """What stays, and as many of the plan's other weights as fit beside it, from a position on."""

    def __init__(
        self,
        plan: Plan,
        sizes: Sequence[int],
        capacity: Capacity,
        keep: frozenset[int],
        position: int,
    ) -> None:
        self.keep = keep
        self.members: set[int] = set()
        self._order, self._sizes = plan.order, sizes
        self._at = {weight: place for place, weight in enumerate(plan.order)}
        self._streams = [weight for weight in plan.order if weight not in keep]
        self._count = capacity.count - len(keep)
        self._room = capacity.size_bytes - sum(sizes[weight] for weight in keep)
        #: Whether it can follow: all that stays is in the plan, and fits.
        self.usable = self._count >= 0 and self._room >= 0 and self._at.keys() >= keep
        self._bounds = (self._count, self._room)
        self._travelled = 0  # so that ranks need not change when the position does
        self._head = self._length = 0  # of the window, in what streams
        self._position = position
        self._start(position)

    def rank(self, weight: int) -> int:
        """Of a member: the smaller, the sooner it is used."""
        return self._travelled + (self._at[weight] - self._position) % len(self._order)

    def move(self, position: int) -> list[int] | None:
        """Follow the engine. What entered, left or changed its rank; None: look at everything."""
        total = len(self._order)
        steps = (position - self._position) % total
        if 2 * steps > total:  # backwards, or a jump
            self._start(position)
            return None
        changed = []
        for place in range(self._position, self._position + steps):
            weight = self._order[place % total]
            changed.append(weight)
            if weight in self.keep:
                continue
            self._head += 1
            if self._length:
                self.members.discard(weight)
                self._length -= 1
                self._count += 1
                self._room += self._sizes[weight]
        self._travelled += steps
        self._position = position
        self._extend(changed)
        return changed

    def beyond(self) -> Iterator[int]:
        """What streams when the members have had their turn."""
        for ahead in range(self._length, len(self._streams)):
            yield self._streams[(self._head + ahead) % len(self._streams)]

    def _start(self, position: int) -> None:
        self._position = position
        self._head = sum(weight not in self.keep for weight in self._order[:position])
        self._length = 0
        self._count, self._room = self._bounds
        self.members.clear()
        self.members.update(self.keep)
        self._extend([])

    def _extend(self, entered: list[int]) -> None:
        while self._length < len(self._streams) and self._count > 0:
            weight = self._streams[(self._head + self._length) % len(self._streams)]
            if self._sizes[weight] > self._room:
                return
            self.members.add(weight)
            entered.append(weight)
            self._length += 1
            self._count -= 1
            self._room -= self._sizes[weight]


class Listed:
    """The longest prefix of ``wishes`` that the capacity holds. Reads no further before it must."""

    def __init__(self, wishes: Iterator[int], sizes: Sequence[int], capacity: Capacity) -> None:
        self.members: dict[int, int] = {}  # rank by weight
        self._more = wishes
        self._beyond: dict[int, None] = {}
        members, count, room = self.members, capacity.count, capacity.size_bytes
        for weight in wishes:
            if weight in members:
                continue
            room -= sizes[weight]
            if room < 0 or len(members) == count:
                self._beyond[weight] = None
                break
            members[weight] = len(members)

    def rank(self, weight: int) -> int:
        """Of a member: the smaller, the more urgent."""
        return self.members[weight]

    def beyond(self) -> Iterator[int]:
        """The wishes that follow."""
        yield from self._beyond
        for weight in self._more:
            if weight not in self.members and weight not in self._beyond:
                self._beyond[weight] = None
                yield weight


Target = Window | Listed
NOTHING = Listed(iter(()), (), Capacity(1, 1))
