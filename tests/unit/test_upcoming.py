"""What the scheduler says it will fill next, and what it costs to be asked."""

from __future__ import annotations

import sys
from random import Random
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.plan import Capacity, Plan
from feeder.scheduler import Fill, Grant, Scheduler
from feeder.strategies.base import Strategy
from feeder.strategies.on_demand import OnDemand
from feeder.strategies.registry import BUILT_IN, make_strategy
from feeder.strategies.resident import Resident
from feeder.strategies.ring import Ring
from tests.pipeline import Pipeline

PLENTY = 1 << 40


def ready(strategy: Strategy, total: int, count: int, size_bytes: int = 512) -> Pipeline:
    """Everything that finds room is in slots, and an engine is there that has used nothing."""
    pipeline = Pipeline([512] * total, Capacity(count, size_bytes * count), strategy)
    pipeline.attach(weight for _ in iter(int, 1) for weight in range(total))
    pipeline.settle()
    return pipeline


def test_ring_goes_on_round_the_plan() -> None:
    pipeline = ready(Ring(), 6, 4)
    assert pipeline.scheduler.upcoming(PLENTY, [1] * 6) == [4, 5]
    pipeline.use(3)  # 0 and 1 have been used and released
    pipeline.settle()
    assert {slot.weight for slot in pipeline.scheduler.slots} == {2, 3, 4, 5}
    assert pipeline.scheduler.upcoming(PLENTY, [1] * 6) == [0, 1]


def test_resident_goes_on_with_what_streams() -> None:
    pipeline = ready(Resident(), 12, 9)
    scheduler = pipeline.scheduler
    keep = scheduler.strategy.keep
    streamed = [weight for weight in range(12) if weight not in keep]
    assert len(keep) == 5  # four stream through four slots
    assert scheduler.upcoming(PLENTY, [1] * 12) == streamed[4:]


@given(sizes=st.lists(st.integers(1, 9), min_size=9, max_size=9), limit=st.integers(0, 40))
def test_it_ends_strictly_at_the_limit(sizes: list[int], limit: int) -> None:
    scheduler = ready(Ring(), 9, 2).scheduler
    found = scheduler.upcoming(limit, sizes)
    assert found == list(range(2, 9))[: len(found)]
    assert sum(sizes[weight] for weight in found) <= limit
    if len(found) < 7:
        assert sum(sizes[weight] for weight in (*found, found[-1] + 1 if found else 2)) > limit


def test_what_is_wanted_and_has_no_slot_comes_first() -> None:
    scheduler = Scheduler(Plan(tuple(range(20))), [512] * 20, Capacity(12, 12 * 512), Ring())
    assert scheduler.upcoming(PLENTY, [1] * 20) == list(range(20))
    fills = scheduler.step()
    assert 0 < len(fills) < 12  # not all at once
    assert scheduler.upcoming(PLENTY, [1] * 20) == list(range(len(fills), 20))
    scheduler.need(17)
    assert scheduler.upcoming(PLENTY, [1] * 20)[0] == 17


def test_fills_from_copies_are_not_counted_with_those_over_the_link() -> None:
    def begun(link_bytes: list[int]) -> list[int]:
        capacity = Capacity(30, 30 * 512)
        scheduler = Scheduler(
            Plan(tuple(range(40))), [512] * 40, capacity, Ring(), link_bytes=link_bytes
        )
        return [command.weight for command in scheduler.step() if isinstance(command, Fill)]

    most = len(begun([1] * 40))
    assert begun([0] * 40) == list(range(30))
    mixed = begun([1, 0] * 20)
    assert mixed == list(range(len(mixed))) and len(mixed) == 2 * most < 30


def test_nothing_is_foreseen_on_demand_but_needs() -> None:
    pipeline = ready(OnDemand(), 6, 3)
    scheduler = pipeline.scheduler
    assert scheduler.upcoming(PLENTY, [1] * 6) == []
    pipeline.use(20)
    pipeline.settle()
    assert scheduler.upcoming(PLENTY, [1] * 6) == []
    weight = next(weight for weight in range(6) if scheduler.slots.get(weight) is None)
    scheduler.need(weight)
    assert scheduler.upcoming(PLENTY, [1] * 6) == [weight]


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_draining_scheduler_fills_nothing(name: str) -> None:
    pipeline = ready(make_strategy(name), 6, 3)
    pipeline.scheduler.drain()
    assert pipeline.scheduler.upcoming(PLENTY, [1] * 6) == []


@pytest.mark.parametrize("name", ["ring", "resident"])
@given(seed=st.integers(0, 1 << 32))
@settings(deadline=None, max_examples=40)
def test_what_is_foreseen_is_what_comes(name: str, seed: int) -> None:
    """An engine that keeps to the plan gets its fills in the order that was said."""
    random = Random(seed)
    total = random.randint(2, 14)
    count = random.randint(1, total)
    pipeline = Pipeline([512] * total, Capacity(count, 512 * count), make_strategy(name), seed)
    pipeline.attach(weight for _ in iter(int, 1) for weight in range(total))
    pipeline.use(2 * total)
    pipeline.settle()
    said = pipeline.scheduler.upcoming(PLENTY, [1] * total)
    assert all(pipeline.scheduler.slots.get(weight) is None for weight in said)
    before = len(pipeline.filled)
    pipeline.use(total)
    come = pipeline.filled[before:]
    common = min(len(come), len(said))
    assert come[:common] == said[:common]


class Own(Ring):
    """Wants what its parent does not."""

    name = "own"

    def wanted(self, position: int) -> Any:
        return reversed(self.plan.order)


def test_a_child_of_ring_with_wishes_of_its_own_is_asked() -> None:
    pipeline = ready(Own(), 6, 2)
    assert {slot.weight for slot in pipeline.scheduler.slots} == {5, 4}
    assert pipeline.scheduler.upcoming(PLENTY, [1] * 6) == [3, 2, 1, 0]


class Faltering(Strategy):
    """Fails beyond what the cache holds."""

    name = "faltering"

    def wanted(self, position: int) -> Any:
        yield from (0, 1, 2)
        raise ArithmeticError("nonsense")


def test_a_strategy_that_fails_further_on_is_replaced() -> None:
    pipeline = ready(Faltering(), 6, 2)
    assert not pipeline.fallbacks
    assert pipeline.scheduler.upcoming(PLENTY, [1] * 6) == []
    assert len(pipeline.fallbacks) == 1
    pipeline.use(12)


def lines_an_event(name: str, total: int, count: int) -> float:
    """Lines of Python that an event costs in the third pass of an engine that keeps to the plan."""
    lines = events = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    scheduler = Scheduler(
        Plan(tuple(range(total))), [512] * total, Capacity(count, 512 * count), make_strategy(name)
    )
    scheduler.attach()
    granted: dict[int, Grant] = {}
    fills: list[Fill] = []

    def obey() -> None:
        for command in scheduler.step():
            if isinstance(command, Fill):
                fills.append(command)
            elif isinstance(command, Grant):
                granted[command.weight] = command
        scheduler.upcoming(2, [1] * total)

    obey()
    for turn in range(3 * total):
        if turn % total not in granted and not fills:
            scheduler.need(turn % total)
            obey()
        while turn % total not in granted:
            scheduler.filled(fills.pop(0).slot)
            obey()
        weight = turn % total
        if granted[weight].standing:
            continue
        former = sys.gettrace()
        sys.settrace(trace if turn >= 2 * total else former)
        grant = granted.pop(weight)
        scheduler.released(grant.slot, grant.generation)
        obey()
        sys.settrace(former)
        events += turn >= 2 * total
    return lines / events


@pytest.mark.parametrize(
    ("name", "share"),
    [("ring", 0.3), ("ring", 0.8), ("resident", 0.3), ("resident", 0.8), ("on-demand", 1.0)],
)
def test_what_an_event_costs_does_not_grow_with_the_plan(name: str, share: float) -> None:
    few, many = (lines_an_event(name, total, int(share * total)) for total in (40, 400))
    assert many < 1.5 * few
