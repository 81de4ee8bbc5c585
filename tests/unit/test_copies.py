"""Packed copies beside dequantized slots: who gets one, what that saves, what a strategy may answer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.blocks import packed_span
from common.config import Cache
from common.errors import StrategyError
from common.plan import Capacity, Plan, largest_window_bytes
from feeder.arena import aligned
from feeder.budget import Request
from feeder.scheduler import Scheduler
from feeder.simulate import load_shape
from feeder.simulation import Hardware, Simulation, Traffic
from feeder.strategies.base import Strategy
from feeder.strategies.registry import BUILT_IN, make_strategy
from feeder.strategies.resident import NEAR_SLOTS, NOT_HIDDEN

ELEMENTS = st.lists(st.integers(1, 400).map(lambda blocks: blocks * 128), min_size=2, max_size=24)


class Memory:
    """So many weights in 2-byte slots, and bytes to be shared out."""

    def __init__(self, elements: Sequence[int], size_bytes: int) -> None:
        self.elements, self.size_bytes = elements, size_bytes
        self.sizes = [aligned(2 * count) for count in elements]
        self.packed = [aligned(packed_span(count)) for count in elements]
        self.plan = Plan(tuple(range(len(elements))))

    def copies(self, strategy: Strategy) -> frozenset[int]:
        request = Request(self.plan, self.sizes, ["w"] * len(self.sizes), Cache.parse("auto"))
        capacity, _ = request.capacity(strategy, self.size_bytes)
        return request.copies(strategy, capacity, self.packed)

    def scheduler(self, copies: frozenset[int], strategy: str = "resident") -> Scheduler:
        slots = self.size_bytes - sum(self.packed[weight] for weight in copies)
        return Scheduler(
            self.plan, self.sizes, Capacity(len(self.sizes), slots), make_strategy(strategy),
            copies=copies, link_bytes=list(self.packed),
        )  # fmt: skip

    def near_bytes(self, copies: frozenset[int]) -> int:
        """Of what stays on the device in one form or the other."""
        near = self.scheduler(copies).strategy.keep | copies
        return sum(self.packed[weight] for weight in near)


@given(elements=ELEMENTS, data=st.data())
@settings(deadline=None, max_examples=150)
def test_resident_with_copies_keeps_nothing_twice_and_the_link_free(
    elements: list[int], data: st.DataObject
) -> None:
    sizes = [aligned(2 * count) for count in elements]
    memory = Memory(elements, data.draw(st.integers(max(sizes), sum(sizes) + 512)))
    copies = memory.copies(make_strategy("resident"))
    keep = memory.scheduler(copies).strategy.keep
    assert not keep & copies
    # It crosses the link no more than without copies, or less than what few slots would cost in time.
    near, before = memory.near_bytes(copies), memory.near_bytes(frozenset())
    _, least = NEAR_SLOTS[-1]
    far = 1 - near / sum(memory.packed)
    assert near >= before or far <= (1 + NOT_HIDDEN) * least
    if memory.size_bytes >= sum(sizes):
        assert not copies and keep == frozenset(range(len(sizes)))
    # As many slots as are of use, and a copy of everything: then nothing need cross the link.
    streaming = sum(sorted(sizes)[-NEAR_SLOTS[0][0] :])
    if memory.size_bytes >= sum(memory.packed) + streaming:
        assert keep | copies == frozenset(range(len(sizes)))


def test_a_32b_shape_in_24_gb() -> None:
    """The case they are for: everything near, with slots for a part of it."""
    layer = [5120 * 5120, 1024 * 5120, 1024 * 5120, 5120 * 5120, *[27648 * 5120] * 3]
    memory = Memory([*layer * 64, 152064 * 5120], 22 << 30)
    copies = memory.copies(make_strategy("resident"))
    kept = memory.scheduler(copies).strategy.keep
    assert len(copies) + len(kept) == 449 and not copies & kept
    # What is left beside copies of all, 5 GB, is worth more than 3 GB of slots that stay.
    assert sum(memory.sizes[weight] for weight in kept) > 3 << 30


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - {"resident"}))
def test_others_want_none(name: str) -> None:
    assert Memory([1280] * 8, 6000).copies(make_strategy(name)) == frozenset()


def test_what_has_a_copy_crosses_the_link_once() -> None:
    elements = [1 << 20] * 40
    memory = Memory(elements, 20 << 20)
    copies = memory.copies(make_strategy("resident"))
    scheduler = memory.scheduler(copies)
    near = scheduler.strategy.keep | copies
    assert 0 < len(copies) < 40 and len(near) < 40
    traffic = Traffic.of(elements, memory.sizes)
    simulation = Simulation(scheduler, traffic, Hardware(1e9, 1e12, 1e-6, 1e-6))
    simulation.attach()
    simulation.run(1)
    assert set(simulation.copied) >= set(range(40)) - scheduler.strategy.keep
    found = simulation.steady()
    assert found.streamed == frozenset(range(40)) - near
    assert found.hits == pytest.approx(len(near) / 40)
    assert found.seconds == pytest.approx(found.streamed_bytes / 1e9, rel=0.02)
    # Under a strategy that keeps nothing the copies serve too.
    scheduler.set_strategy(make_strategy("ring"))
    assert simulation.steady().streamed == frozenset(range(40)) - copies


class Odd(Strategy):
    name = "odd"

    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer

    def copies(
        self, plan: Plan, sizes: Sequence[int], packed_sizes: Sequence[int], size_bytes: int
    ) -> frozenset[int]:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ([1], "not a frozenset of weights"),
        (frozenset({8}), "not a frozenset of weights"),
        (frozenset({True}), "not a frozenset of weights"),
        (ValueError("no idea"), r"copies raises ValueError\('no idea'\)"),
        (frozenset(range(8)), "leaves 0 bytes for slots, and the largest weight needs 2,560"),
    ],
)
def test_a_strategy_that_cannot_say_is_refused(answer: object, what: str) -> None:
    with pytest.raises(StrategyError, match=what):
        Memory([1280] * 8, 8 * 1024).copies(Odd(answer))


@pytest.mark.parametrize("gib", [4, 8, 12, 16, 18, 24, 40])
def test_what_passes_has_slots_to_hide_the_hand_over_in(gib: int) -> None:
    """With four slots, and nearly all weights near, a token took three times as long as with eight."""
    _, elements = load_shape("qwen2.5-32b")
    memory = Memory(elements, gib << 30)
    copies = memory.copies(make_strategy("resident"))
    scheduler = memory.scheduler(copies)
    passing = [weight for weight in memory.plan.order if weight not in scheduler.kept]
    kept = sum(memory.sizes[weight] for weight in scheduler.kept)
    assert kept + largest_window_bytes(passing, memory.sizes, 8) <= scheduler.capacity.size_bytes
