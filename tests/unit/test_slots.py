"""Slots: the table of transitions is obeyed, and what it forbids changes nothing."""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.errors import InternalError
from common.slots import HELD, TRANSITIONS, Event, IllegalTransition, Slot, SlotTable, State

#: What may happen to a slot, said once more and in another way than the code does.
LEGAL = """
    free -fill-> filling -filled-> ready -grant-> in_use -release-> ready
    in_use -revoke-> revoked -release-> ready
    in_use -lose-> lost -recover-> ready -evict-> free
    revoked -lose-> lost
"""


def legal() -> dict[tuple[State, Event], State]:
    table = {}
    for line in LEGAL.strip().splitlines():
        words = line.replace("->", " ").replace(" -", " ").split()
        for state, event, after in zip(words[0::2], words[1::2], words[2::2], strict=False):
            table[State(state), Event(event)] = State(after)
    return table


EXPECTED = legal()


def in_state(state: State) -> tuple[SlotTable, Slot]:
    """A table whose slot of weight 7 is in ``state``; a FREE one has been used before."""
    table = SlotTable()
    slot = table.fill(7, 1024, 512)
    steps = {
        State.FILLING: [],
        State.READY: [Event.FILLED],
        State.IN_USE: [Event.FILLED, Event.GRANT],
        State.REVOKED: [Event.FILLED, Event.GRANT, Event.REVOKE],
        State.LOST: [Event.FILLED, Event.GRANT, Event.LOSE],
        State.FREE: [Event.FILLED, Event.EVICT],
    }
    for event in steps[state]:
        happen(table, slot, event)
    assert slot.state is state
    return table, slot


def happen(table: SlotTable, slot: Slot, event: Event) -> None:
    if event is Event.GRANT:
        table.grant(slot, standing=True)
    else:
        table.apply(slot, event)


def image(table: SlotTable, slot: Slot) -> tuple[object, ...]:
    """Everything that can be seen of the table and the slot."""
    return dataclasses.astuple(slot), len(table), list(table), table.get(7), table.by_id(slot.id)


def test_the_table_is_the_one_that_is_documented() -> None:
    assert TRANSITIONS == EXPECTED


@pytest.mark.parametrize(
    ("state", "event"), [pair for pair in product(State, Event) if pair[1] is not Event.FILL]
)
def test_every_event_in_every_state(state: State, event: Event) -> None:
    table, slot = in_state(state)
    before = image(table, slot)
    generation = slot.generation
    after = EXPECTED.get((state, event))
    if after is None:
        with pytest.raises(IllegalTransition, match=r"slot 0 is \w+: \w+ is not legal there"):
            happen(table, slot, event)
        assert image(table, slot) == before
        return
    happen(table, slot, event)
    assert slot.state is after
    assert slot.generation == generation + (event is Event.GRANT)
    assert slot.standing == (event is Event.GRANT or (before[0][-1] and event is Event.REVOKE))  # type: ignore[index]
    assert (table.get(7) is slot) == (after is not State.FREE)
    assert len(table) == (after is not State.FREE)


@pytest.mark.parametrize("state", [state for state in State if state is not State.FREE])
def test_a_weight_is_in_one_slot(state: State) -> None:
    table, slot = in_state(state)
    before = image(table, slot)
    with pytest.raises(IllegalTransition, match="weight 7 is in a slot already"):
        table.fill(7, 0, 512)
    assert image(table, slot) == before


@pytest.mark.parametrize("event", [Event.FILL, Event.GRANT])
@pytest.mark.parametrize("state", State)
def test_fill_and_grant_are_not_to_be_applied(state: State, event: Event) -> None:
    """They have methods of their own, which note what has to be noted."""
    table, slot = in_state(state)
    before = image(table, slot)
    with pytest.raises(IllegalTransition, match="has a method of its own"):
        table.apply(slot, event)
    assert image(table, slot) == before


def test_an_illegal_transition_is_a_defect_of_ours() -> None:
    assert issubclass(IllegalTransition, InternalError)


def test_a_free_slot_is_used_again_and_counts_on() -> None:
    table, slot = in_state(State.IN_USE)
    for event in (Event.RELEASE, Event.EVICT):
        table.apply(slot, event)
    again = table.fill(9, 0, 100)
    assert again is slot
    assert (again.weight, again.offset_bytes, again.size_bytes) == (9, 0, 100)
    table.apply(again, Event.FILLED)
    table.grant(again, standing=False)
    assert again.generation == 2


def test_the_grants_of_two_feeders_differ() -> None:
    table = SlotTable(first_generation=5_000_000)
    slot = table.fill(0, 0, 1)
    table.apply(slot, Event.FILLED)
    table.grant(slot, standing=False)
    assert slot.generation == 5_000_001
    assert table.held(0, 1) is None
    assert table.held(0, 5_000_001) is slot


@pytest.mark.parametrize("slot_id", [-1, 1, 2, 1 << 62])
def test_a_slot_that_does_not_exist_is_not_held(slot_id: int) -> None:
    table, slot = in_state(State.IN_USE)
    assert table.held(slot_id, slot.generation) is None


class Machine(RuleBasedStateMachine):
    """Any events on any slots, against a model that is a dict of plain values."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(first_generation=3)
        self.slots: dict[int, Slot] = {}  # by weight
        self.states: dict[int, State] = {}
        self.seen: dict[int, list[int]] = {}  # by slot: the generations granted
        self.highest = 0

    @rule(weight=st.integers(0, 5), offset=st.integers(0, 99))
    def fill(self, weight: int, offset: int) -> None:
        if weight in self.slots:
            with pytest.raises(IllegalTransition):
                self.table.fill(weight, offset, 1)
            return
        slot = self.table.fill(weight, offset, offset + 1)
        assert slot.id not in {other.id for other in self.slots.values()}
        assert (slot.weight, slot.offset_bytes, slot.size_bytes) == (weight, offset, offset + 1)
        assert not slot.standing
        self.slots[weight], self.states[weight] = slot, State.FILLING
        self.highest = max(self.highest, len(self.slots))

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), event=st.sampled_from([e for e in Event if e is not Event.FILL]))
    def happen(self, data: st.DataObject, event: Event) -> None:
        weight = data.draw(st.sampled_from(sorted(self.slots)))
        slot = self.slots[weight]
        after = EXPECTED.get((self.states[weight], event))
        if after is None:
            before = dataclasses.astuple(slot)
            with pytest.raises(IllegalTransition):
                happen(self.table, slot, event)
            assert dataclasses.astuple(slot) == before
            return
        happen(self.table, slot, event)
        self.states[weight] = after
        if event is Event.GRANT:
            granted = self.seen.setdefault(slot.id, [])
            assert slot.generation > max(granted, default=3), "a generation came again"
            granted.append(slot.generation)
        if after is State.FREE:
            del self.slots[weight], self.states[weight]

    @invariant()
    def agrees(self) -> None:
        assert {slot.weight: slot.state for slot in self.table} == self.states
        assert len(self.table) == len(self.slots)
        for weight in range(6):
            assert self.table.get(weight) is self.slots.get(weight)
        for weight, slot in self.slots.items():
            assert self.table.by_id(slot.id) is slot
            for generation in range(3, slot.generation + 2):
                held = self.states[weight] in HELD and generation == slot.generation
                assert (self.table.held(slot.id, generation) is slot) == held
        ids = [slot.id for slot in self.slots.values()]
        assert all(0 <= number < self.highest for number in ids), "a free slot was not used again"


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase
