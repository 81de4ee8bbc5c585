"""Slot states and the one table of legal transitions. Pure Python: knows no memory, no sockets, no clock.

A slot is an extent of a segment that holds one weight for a while. The table below is data: the
property tests walk it and the diagram in docs/architecture.md is drawn from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from common.errors import InternalError


class State(Enum):
    __hash__ = object.__hash__  # Enum's own is a call of Python, and costs more than the lookup

    FREE = "free"  # holds nothing
    FILLING = "filling"  # a fill is on its way; the bytes are not to be read
    READY = "ready"  # filled, and not with the engine
    IN_USE = "in_use"  # granted: the engine may read it at any moment
    REVOKED = "revoked"  # granted, and asked back
    LOST = "lost"  # granted to an engine that died


class Event(Enum):
    __hash__ = object.__hash__

    FILL = "fill"
    FILLED = "filled"
    GRANT = "grant"
    RELEASE = "release"
    REVOKE = "revoke"
    LOSE = "lose"
    RECOVER = "recover"
    EVICT = "evict"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.FREE, Event.FILL): State.FILLING,
    (State.FILLING, Event.FILLED): State.READY,
    (State.READY, Event.GRANT): State.IN_USE,
    # A released slot still holds its weight: READY, so that it can be granted again unfilled.
    (State.IN_USE, Event.RELEASE): State.READY,
    (State.IN_USE, Event.REVOKE): State.REVOKED,
    (State.REVOKED, Event.RELEASE): State.READY,
    (State.IN_USE, Event.LOSE): State.LOST,
    (State.REVOKED, Event.LOSE): State.LOST,
    # The engine only reads, so what it held when it died is intact.
    (State.LOST, Event.RECOVER): State.READY,
    (State.READY, Event.EVICT): State.FREE,
}

#: States in which the engine may read the slot's bytes.
HELD = frozenset({State.IN_USE, State.REVOKED})


@dataclass(slots=True)
class Slot:
    """One slot. ``generation`` rises at every grant, so a message about an older grant is recognised."""

    id: int
    state: State = State.FREE
    generation: int = 0
    weight: int = -1
    offset_bytes: int = 0
    size_bytes: int = 0
    standing: bool = False


class IllegalTransition(InternalError):
    """An event that the table does not allow in the slot's state. The slot is unchanged."""


class SlotTable:
    """All slots of one feeder, by id and by weight. One weight is in at most one slot."""

    def __init__(self, first_generation: int = 0) -> None:
        """``first_generation``: where counting starts; differs between feeders of one name, so that
        a message meant for a dead one is never mistaken for the living one's."""
        self._first_generation = first_generation
        self._slots: list[Slot] = []
        self._free_ids: list[int] = []
        self._by_weight: dict[int, Slot] = {}
        #: The slot that holds a weight (or is being filled with it), if any. Asked at every turn: the
        #: dictionary's own method, which takes a third of the time of one that calls it.
        self.get: Callable[[int], Slot | None] = self._by_weight.get

    def __iter__(self) -> Iterator[Slot]:
        """The slots that are not FREE."""
        return iter(self._by_weight.values())

    def __len__(self) -> int:
        """How many slots are not FREE."""
        return len(self._by_weight)

    def held(self, slot_id: int, generation: int) -> Slot | None:
        """The slot of this very grant if the engine still holds it, else None (a stale message)."""
        if not 0 <= slot_id < len(self._slots):
            return None
        slot = self._slots[slot_id]
        return slot if slot.state in HELD and slot.generation == generation else None

    def by_id(self, slot_id: int) -> Slot:
        return self._slots[slot_id]

    def fill(self, weight: int, offset_bytes: int, size_bytes: int) -> Slot:
        """Take a FREE slot for ``weight`` and put it in FILLING."""
        if weight in self._by_weight:
            raise IllegalTransition(f"weight {weight} is in a slot already")
        if self._free_ids:
            slot = self._slots[self._free_ids.pop()]
        else:
            slot = Slot(len(self._slots), generation=self._first_generation)
            self._slots.append(slot)
        self._move(slot, Event.FILL)
        slot.weight, slot.offset_bytes, slot.size_bytes = weight, offset_bytes, size_bytes
        slot.standing = False
        self._by_weight[weight] = slot
        return slot

    def grant(self, slot: Slot, standing: bool) -> None:
        """READY to IN_USE, with a new generation."""
        self._move(slot, Event.GRANT)
        slot.generation += 1
        slot.standing = standing

    def apply(self, slot: Slot, event: Event) -> None:
        """Any other event. Raises IllegalTransition, changing nothing, if the table forbids it."""
        if event in (Event.FILL, Event.GRANT):
            raise IllegalTransition(f"{event.value} has a method of its own")
        self._move(slot, event)
        if event is Event.RELEASE or event is Event.LOSE:
            slot.standing = False
        if slot.state is State.FREE:
            del self._by_weight[slot.weight]
            slot.weight = -1
            self._free_ids.append(slot.id)

    def _move(self, slot: Slot, event: Event) -> None:
        state = TRANSITIONS.get((slot.state, event))
        if state is None:
            raise IllegalTransition(
                f"slot {slot.id} is {slot.state.value}: {event.value} is not legal there"
            )
        slot.state = state
