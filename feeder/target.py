"""The target: the longest prefix of needs and wishes that the capacity holds. Knows no slots.

`Window` follows a cyclic strategy piece by piece: when the engine moves on by a weight, that weight
leaves and others enter, and nothing else is looked at. `Recent` follows `on-demand`. `Listed` is what
any strategy answered at one moment. All say which weights are wanted (`members`), how urgently
(`rank`), and what the strategy goes on with (`beyond`).
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


class Recent:
    """The need, and before it as many of the ``recent`` weights as fit, the last used first: what
    ``on-demand`` wants. All of ``recent`` (oldest first) are in slots, so hardly any is left out."""

    def __init__(
        self, recent: dict[int, None], sizes: Sequence[int], capacity: Capacity, need: int | None
    ) -> None:
        self.members: set[int] = set()
        self._recent, self._sizes, self._capacity = recent, sizes, capacity
        self._used: dict[int, int] = {}  # when each of the recent was used, counted
        self._clock = self._bytes = 0
        self._need: int | None = None
        self._left_out: set[int] = set()
        self.follow(list(recent), need)

    def follow(self, used: Sequence[int], need: int | None) -> set[int]:
        """``used``: what was used or left its slot since, in order. Which ones that concerns."""
        for weight in used:
            self._clock += 1
            if weight in self._recent:
                self._bytes += 0 if weight in self._used else self._sizes[weight]
                self._used[weight] = self._clock
            elif self._used.pop(weight, None) is not None:
                self._bytes -= self._sizes[weight]
        left_out = set(self._oldest(need))
        concerned = {*used, *(left_out ^ self._left_out)}
        concerned.update(w for w in (need, self._need) if w is not None)
        self._left_out, self._need = left_out, need
        for weight in concerned:
            if weight == need or (weight in self._used and weight not in left_out):
                self.members.add(weight)
            else:
                self.members.discard(weight)
        return concerned

    def rank(self, weight: int) -> int:
        """Of a member: the smaller, the more urgent."""
        return (1 << 40) - self._used.get(weight, 1 << 40)

    def beyond(self) -> Iterator[int]:
        """Nothing is fetched ahead."""
        return iter(())

    def _oldest(self, need: int | None) -> Iterator[int]:
        """Those for which there is no room."""
        extra = need is not None and need not in self._used
        count = len(self._used) + extra - self._capacity.count
        room = self._capacity.size_bytes - self._bytes
        if extra and need is not None:
            room -= self._sizes[need]
        for weight in self._recent:
            if count <= 0 and room >= 0:
                return
            if weight != need:
                yield weight
                count -= 1
                room += self._sizes[weight]


Target = Window | Recent | Listed
NOTHING = Listed(iter(()), (), Capacity(1, 1))
