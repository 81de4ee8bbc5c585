"""The arena against a model that looks at every unit of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from feeder.arena import ALIGNMENT_BYTES, Arena, aligned

UNIT = ALIGNMENT_BYTES


@given(st.integers(0, 1 << 50))
def test_aligned_is_the_next_multiple(size_bytes: int) -> None:
    result = aligned(size_bytes)
    assert result % 512 == 0
    assert size_bytes <= result < size_bytes + 512


def room_for(used: dict[int, int], low: int, high: int, size: int) -> list[int]:
    """Every offset in ``[low, high)`` where ``size`` bytes lie free, unit by unit."""
    first = -(-low // UNIT) * UNIT
    return [
        at
        for at in range(first, high - size + 1, UNIT)
        if all(at + size <= start or end <= at for start, end in used.items())
    ]


class Machine(RuleBasedStateMachine):
    """Allocates and frees at random, in the whole arena and in parts of it."""

    @initialize(units=st.integers(1, 24), rest=st.integers(0, UNIT - 1))
    def make(self, units: int, rest: int) -> None:
        self.size = units * UNIT + rest  # the device's free bytes are no multiple of anything
        self.arena = Arena(self.size)
        self.used: dict[int, int] = {}  # offset -> end

    def _allocate(self, size: int, low: int, high: int, offset: int | None) -> None:
        needed = -(-size // UNIT) * UNIT
        possible = room_for(self.used, low, high, needed)
        if offset is None:
            assert not possible, f"{needed} bytes would fit at {possible}"
            return
        assert offset in possible
        self.used[offset] = offset + needed

    @rule(size=st.integers(1, 7 * UNIT))
    def allocate(self, size: int) -> None:
        self._allocate(size, 0, self.size, self.arena.allocate(size))

    @rule(size=st.integers(1, 4 * UNIT), border=st.integers(0, 26), above=st.booleans())
    def allocate_on_one_side(self, size: int, border: int, above: bool) -> None:
        border = min(border * UNIT, self.size)
        if above:
            offset = self.arena.allocate(size, floor=border)
            self._allocate(size, border, self.size, offset)
        else:
            offset = self.arena.allocate(size, ceiling=border)
            self._allocate(size, 0, border, offset)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.used)))
        self.arena.free(offset)
        del self.used[offset]

    @rule(offset=st.integers(-UNIT, 26 * UNIT))
    def free_what_is_not_there(self, offset: int) -> None:
        if offset not in self.used:
            with pytest.raises(KeyError):
                self.arena.free(offset)

    @invariant()
    def counts(self) -> None:
        used = sum(end - start for start, end in self.used.items())
        assert self.arena.free_bytes == self.size - used

    def teardown(self) -> None:
        """Whatever was done: when all is given back, all can be taken in one piece."""
        if not hasattr(self, "arena"):
            return
        for offset in sorted(self.used, key=lambda offset: hash(offset * 2654435761)):
            self.arena.free(offset)
        assert self.arena.allocate(self.size // UNIT * UNIT) == 0


Machine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase


@given(sizes=st.lists(st.integers(1, 5), min_size=3, max_size=40), most=st.integers(2, 16))
@settings(deadline=None)
def test_a_ring_walks_round(sizes: list[int], most: int) -> None:
    """The next extent begins where the last one ended, although there may be room further down."""
    arena = Arena(16 * UNIT)
    live: dict[int, int] = {}
    end = 0
    for size in sizes:
        possible = room_for(live, 0, 16 * UNIT, size * UNIT)
        while not possible or len(live) >= most:
            del live[oldest := next(iter(live))]
            arena.free(oldest)
            possible = room_for(live, 0, 16 * UNIT, size * UNIT)
        offset = arena.allocate(size * UNIT)
        assert offset in possible
        assert offset == end or end not in possible
        live[offset] = end = offset + size * UNIT


def test_an_arena_smaller_than_one_unit_holds_nothing() -> None:
    assert Arena(UNIT - 1).allocate(1) is None
