"""Which weights there may be something to do about: so that an event costs a look at those it touches,
and not at every slot. Decides nothing.

For each weight that is wanted or in a slot it is known whether it is missing, can be granted, or may
make room for another. What changes a weight's slot or whether it is wanted is followed by a `touch`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from heapq import merge

from common.slots import Slot, SlotTable, State
from feeder.ranked import Ranked, weight_of
from feeder.target import NOTHING, Target

#: Where a weight is listed. The first two, missing, never go with others.
_STREAMS, _STAYS, _GRANTABLE, _READY, _LENT = 1, 2, 4, 8, 16
_MISSING = _STREAMS | _STAYS
_IS_READY, _IS_IN_USE = State.READY, State.IN_USE  # looked up once: `touch` is called very often


class Agenda:
    """What the target and the slots come to.

    ``missing``: wanted and in no slot: those that stream, and those that stay; most urgent first.
    ``grantable``: wanted and READY. ``ready`` and ``lent``: may make room, and are READY or IN_USE;
    oldest first.
    """

    def __init__(self, slots: SlotTable) -> None:
        self._slots = slots
        self.target: Target = NOTHING
        self.need: int | None = None  # the weight that the engine is blocked on
        self.keep: frozenset[int] = frozenset()  # what stays, as slots are laid out for it
        self.keep_bytes = 0  # the region of what stays
        self._born: dict[int, int] = {}  # by weight in a slot: which fill it was
        self._fills = 0
        self.touch_all()

    def set_target(self, target: Target, changed: Iterable[int] | None) -> None:
        """``changed``: what entered, left or has another rank; None if nothing is known of it."""
        self.target = target
        if changed is None:
            self.touch_all()
            return
        for weight in changed:
            self.touch(weight)

    def set_need(self, weight: int | None) -> None:
        former, self.need = self.need, weight
        for changed in (former, weight):
            if changed is not None:
                self.touch(changed)

    def set_keep(self, keep: frozenset[int], sizes: Sequence[int]) -> None:
        self.keep, self.keep_bytes = keep, sum(sizes[weight] for weight in keep)
        self.touch_all()

    def begun(self, weight: int) -> None:
        """A fill of the weight has begun."""
        self._fills += 1
        self._born[weight] = self._fills
        self.touch(weight)

    def rank(self, weight: int) -> int:
        """Of a wanted weight: the smaller, the more urgent."""
        return -1 if weight == self.need else self.target.rank(weight)

    def touch(self, weight: int) -> None:
        """Something about the weight has changed: its slot, or whether it is wanted."""
        slot = self._slots.get(weight)
        wanted = weight in self.target.members
        now = 0
        if slot is None:
            if wanted:
                now = _STAYS if weight in self.keep else _STREAMS
        elif (state := slot.state) is _IS_READY or state is _IS_IN_USE:
            # A need may lie anywhere until it is granted.
            dispensable = weight != self.need and (not wanted or self._misplaced(slot))
            if state is _IS_IN_USE:
                now = _LENT if dispensable else 0
            else:
                now = (_GRANTABLE if wanted else 0) | (_READY if dispensable else 0)
        before = self._listed.get(weight, 0)
        if now == before:
            if now & _MISSING:  # its rank may be another
                self.missing[now == _STAYS].put(weight, self.rank(weight))
            return
        self._listed[weight] = now
        if gone := before & ~now:
            self._unlist(weight, gone)
        if new := now & ~before:
            self._list(weight, new)

    def _unlist(self, weight: int, gone: int) -> None:
        if gone & _MISSING:
            self.missing[gone == _STAYS].discard(weight)
        if gone & _GRANTABLE:
            self.grantable.discard(weight)
        if gone & _READY:
            self.ready.discard(weight)
        if gone & _LENT:
            self.lent.discard(weight)

    def _list(self, weight: int, new: int) -> None:
        if new & _MISSING:
            self.missing[new == _STAYS].put(weight, self.rank(weight))
        if new & _GRANTABLE:
            self.grantable.add(weight)
        if new & _READY:
            self.ready.put(weight, self._born[weight])
        if new & _LENT:
            self.lent.put(weight, self._born[weight])

    def touch_all(self) -> None:
        self.missing = (Ranked(), Ranked())
        self.grantable: set[int] = set()
        self.ready, self.lent = Ranked(), Ranked()
        self._listed: dict[int, int] = {}  # by weight: where it is, so that most looks end there
        for weight in self.target.members:
            self.touch(weight)
        for slot in self._slots:
            self.touch(slot.weight)

    def next_missing(self, passed: int, stuck: Container[bool]) -> int | None:
        """The key of the most urgent one after the key ``passed``, but for the stuck regions."""
        streams, stays = self.missing
        one = streams.after(passed) if streams.keys and False not in stuck else None
        other = stays.after(passed) if stays.keys and True not in stuck else None
        if one is None or other is None:
            return one if other is None else other
        return min(one, other)

    def to_come(self) -> Iterator[int]:
        """What is missing, then what is wished beyond the target and in no slot. Most urgent first."""
        yield from map(weight_of, merge(*(missing.keys for missing in self.missing)))
        for weight in self.target.beyond():
            if self._slots.get(weight) is None:
                yield weight

    def wishes_in_slots(self) -> list[int]:
        """Those that are wanted, but for the need; the least urgent first."""
        found = [
            w for w in self.target.members if w != self.need and self._slots.get(w) is not None
        ]
        return sorted(found, key=self.rank, reverse=True)

    def _misplaced(self, slot: Slot) -> bool:
        """In the wrong region: it was filled under another strategy, or could not wait."""
        if slot.weight in self.keep:
            return slot.offset_bytes + slot.size_bytes > self.keep_bytes
        return slot.offset_bytes < self.keep_bytes
