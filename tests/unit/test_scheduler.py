"""The scheduler under every strategy, with an engine that does anything an engine may do.

`tests.pipeline` runs the real scheduler against the real ledger and checks, after every event, that the
cache's bounds hold, that no two slots overlap, that nothing the engine or a fill has is taken away, and
that what the engine reads is the weight it asked for. Here the histories are made.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import protocol as p
from common.errors import InternalError
from common.plan import Capacity, Plan
from feeder.arena import aligned
from feeder.scheduler import Scheduler
from feeder.strategies.base import Strategy
from feeder.strategies.on_demand import OnDemand
from feeder.strategies.registry import BUILT_IN, make_strategy
from feeder.strategies.resident import Resident, stream_slots
from feeder.strategies.ring import Ring
from tests.pipeline import Pipeline

SEEDS = st.integers(0, 1 << 32)
ORDERS = ("plan", "reverse", "shuffled", "random")
PATIENCE = 800  # events without a use, in which any need must have been served


def order_of(kind: str, total: int, random: Random) -> Iterator[int]:
    """An endless order of use."""
    shuffled = random.sample(range(total), total)
    for i in itertools.count():
        match kind:
            case "plan":
                yield i % total
            case "reverse":
                yield total - 1 - i % total
            case "shuffled":
                yield shuffled[i % total]
            case "random":
                yield random.randrange(total)


def random_sizes(random: Random) -> list[int]:
    count = random.randint(1, 9)
    return [random.choice((1, 2, 3, 5, 8, 13)) * 512 - random.randint(0, 511) for _ in range(count)]


def random_capacity(random: Random, sizes: list[int], strategy: Strategy) -> Capacity:
    """From one weight up, bounded by bytes, or by the number as the strategy needs it."""
    slots = [aligned(size) for size in sizes]
    count = random.randint(1, len(sizes) + 1)
    if random.random() < 0.5:
        return Capacity(count, random.randint(max(slots), sum(slots)))
    plan = Plan(tuple(range(len(sizes))))
    needed = strategy.arena_bytes(plan, slots, min(count, len(sizes)))
    return Capacity(count, max(needed, *slots))


class History:
    """A pipeline and what befalls it."""

    def __init__(self, seed: int, make: Callable[[Random], Strategy], **options: Any) -> None:
        self.random = Random(seed)
        self.make = lambda: make(self.random)
        self.sizes = random_sizes(self.random)
        strategy = self.make()
        self.pipeline = Pipeline(
            self.sizes, random_capacity(self.random, self.sizes, strategy), strategy, seed,
            asynchronous=self.random.random() < 0.5, **options,
        )  # fmt: skip
        self.attach()

    def attach(self) -> None:
        kind = self.random.choice(ORDERS)
        self.pipeline.attach(order_of(kind, len(self.sizes), self.random))

    def run(self, events: int, mishaps: float = 0.0) -> None:
        """Let ``events`` things happen, some of them mishaps; every need is served soon."""
        pipeline, idle, uses = self.pipeline, 0, 0
        for _ in range(events):
            if self.random.random() < mishaps:
                self.mishap()
                idle = 0
            if not pipeline.possible() and pipeline.dead:
                pipeline.detach()
                self.attach()
                idle = 0
            assert pipeline.possible(), f"deadlock: {pipeline.situation()}"
            pipeline.advance()
            assert pipeline.engine is not None
            idle = 0 if pipeline.engine.uses != uses or pipeline.dead else idle + 1
            uses = pipeline.engine.uses
            assert idle < PATIENCE, f"not served: {pipeline.situation()}"

    def mishap(self) -> None:
        pipeline, random, total = self.pipeline, self.random, len(self.sizes)
        match random.randrange(6):
            case 0 if not pipeline.dead:
                pipeline.kill()
            case 1 if pipeline.dead:
                pipeline.detach()
                self.attach()
            case 2:
                pipeline.swap(self.make())
            case 3:
                strategy = self.make()
                pipeline.resize(random_capacity(random, self.sizes, strategy), strategy)
            case 4 if not pipeline.dead and pipeline.engine is not None:
                weights = tuple(random.sample(range(total), random.randint(1, total)))
                pipeline.engine.outbox.append(p.Plan(weights))
            case 5:
                pipeline.stale_release()


class Whimsical(Strategy):
    """Answers anything that is legal, and changes its mind at every call."""

    name = "whimsical"

    def __init__(self, random: Random) -> None:
        super().__init__()
        self.random = random

    def _change(self, weight: int = 0) -> None:
        if self.random.random() < 0.1:
            total = len(self.sizes)
            self.keep = frozenset(self.random.sample(range(total), self.random.randint(0, total)))

    needed = released = filled = freed = _change

    def wanted(self, position: int) -> Iterable[int]:
        self._change()
        total = len(self.sizes)
        return [self.random.randrange(total) for _ in range(self.random.randint(0, 2 * total))]


def any_strategy(random: Random) -> Strategy:
    name = random.choice((*BUILT_IN, "whimsical"))
    return Whimsical(random) if name == "whimsical" else make_strategy(name)


MAKERS: dict[str, Callable[[Random], Strategy]] = {
    "ring": lambda _: Ring(),
    "resident": lambda _: Resident(),
    "on-demand": lambda _: OnDemand(),
    "whimsical": Whimsical,
}


@pytest.mark.parametrize("name", MAKERS)
@given(seed=SEEDS)
@settings(deadline=None, max_examples=20)
def test_any_order_of_use_is_served(name: str, seed: int) -> None:
    history = History(seed, MAKERS[name])
    history.run(600)
    assert not history.pipeline.fallbacks


@given(seed=SEEDS)
@settings(deadline=None, max_examples=80)
def test_whatever_befalls_it_every_need_is_served(seed: int) -> None:
    """Engines die and come back, strategies, plans and caches change, stale messages arrive."""
    history = History(seed, any_strategy, first_generation=seed % 7)
    history.run(900, mishaps=0.02)
    assert not history.pipeline.fallbacks


@given(seed=SEEDS)
@settings(deadline=None, max_examples=40)
def test_an_engine_that_holds_several_weights_is_served(seed: int) -> None:
    """It takes them together or not at all, so that it never blocks while it holds one."""
    history = History(seed, any_strategy, hold=3)
    history.run(700, mishaps=0.01)
    assert not history.pipeline.fallbacks


@pytest.mark.parametrize("name", BUILT_IN)
def test_several_weights_are_had_together_where_they_fit(name: str) -> None:
    pipeline = Pipeline([512] * 8, Capacity(8, 512 * 8), make_strategy(name), hold=3)
    engine = pipeline.attach(order_of("plan", 8, Random(0)))
    pipeline.use(60)
    assert engine.together > 10


@given(seed=SEEDS)
@settings(deadline=None, max_examples=15)
def test_a_hundred_swaps_in_one_generation(seed: int) -> None:
    history = History(seed, any_strategy)
    pipeline = history.pipeline
    for _ in range(100):
        pipeline.swap(any_strategy(history.random))
        history.run(5)
    history.run(200)


# What is special about each strategy -----------------------------------------------------------------


def pipeline_of(
    strategy: Strategy, sizes: list[int], count: int, seed: int, kind: str = "plan"
) -> Pipeline:
    """With the bytes that the strategy asks for, and an engine that uses weights in order ``kind``."""
    needed = strategy.arena_bytes(Plan(tuple(range(len(sizes)))), sizes, min(count, len(sizes)))
    pipeline = Pipeline(sizes, Capacity(count, max(needed, *sizes)), strategy, seed)
    pipeline.attach(order_of(kind, len(sizes), Random(seed)))
    return pipeline


def one_pass(pipeline: Pipeline) -> int:
    """The fills that one pass of an engine takes that is slower than the link."""
    before = len(pipeline.filled)
    for _ in pipeline.sizes:
        pipeline.settle()
        pipeline.use(1)
    pipeline.settle()
    return len(pipeline.filled) - before


def model_sizes(layers: int, unit: int = 512) -> list[int]:
    """In the proportions of a real model: q, k, v, o, gate, up, down of each layer, and lm_head."""
    return [*(25, 5, 5, 25, 138, 138, 138) * layers, 760 * layers // 8 + 25]


@pytest.mark.parametrize(
    ("count", "total"), [(n, m) for m in (*range(1, 10), 17) for n in range(1, m + 1)]
)
def test_resident_reaches_the_optimum(count: int, total: int) -> None:
    """N of M weights in slots, k of them streaming: exactly (N - k) / M of the uses hit."""
    pipeline = pipeline_of(Resident(), [512] * total, count, seed=count)
    kept = count - stream_slots(count, total)
    one_pass(pipeline)
    waits = pipeline.engine.waits if pipeline.engine else 0
    for _ in range(3):
        assert one_pass(pipeline) == total - kept
    assert pipeline.scheduler.hit_rate == pytest.approx(kept / total)
    if count > 1 and pipeline.engine is not None:  # what streams is there before it is needed
        assert pipeline.engine.waits == waits


@pytest.mark.parametrize("count", [1, 4, 5, 9, 16, 25, 31, 34, 36])
def test_resident_reaches_the_optimum_with_the_sizes_of_a_model(count: int) -> None:
    sizes = [512 * size for size in model_sizes(5)]
    pipeline = pipeline_of(Resident(), sizes, count, seed=count)
    kept = count - stream_slots(count, len(sizes))
    one_pass(pipeline)
    one_pass(pipeline)  # what lay in another's way at first has found its place
    assert [one_pass(pipeline) for _ in range(3)] == [len(sizes) - kept] * 3
    assert pipeline.scheduler.hit_rate == pytest.approx(kept / len(sizes))


@pytest.mark.parametrize("count", [2, 3, 35])
def test_where_sizes_hardly_fit_resident_comes_within_one_fill(count: int) -> None:
    """Of few slots, one may lie in the way of a larger weight, and has to be filled again."""
    sizes = [512 * size for size in model_sizes(5)]
    pipeline = pipeline_of(Resident(), sizes, count, seed=count)
    streamed = len(sizes) - (count - stream_slots(count, len(sizes)))
    one_pass(pipeline)
    assert sum(one_pass(pipeline) for _ in range(6)) <= 6 * (streamed + 1)


@pytest.mark.parametrize("count", [5, 12])
def test_what_is_resident_costs_no_messages(count: int) -> None:
    pipeline = pipeline_of(Resident(), [512] * 12, count, seed=1)
    one_pass(pipeline)
    before = pipeline.scheduler.counters
    grants, releases = before.grants, before.releases
    streamed = 12 - (count - stream_slots(count, 12))
    one_pass(pipeline)
    counters = pipeline.scheduler.counters
    assert (counters.grants - grants, counters.releases - releases) == (streamed, streamed)


@pytest.mark.parametrize(
    ("count", "total"), [(n, m) for m in (*range(2, 8), 17) for n in range(1, m)]
)
@pytest.mark.parametrize("room", ["just enough", "plenty"])
def test_ring_hits_nothing_but_is_ahead(count: int, total: int, room: str) -> None:
    slots = count if room == "just enough" else total
    pipeline = Pipeline([512] * total, Capacity(count, 512 * slots), Ring(), seed=count)
    engine = pipeline.attach(order_of("plan", total, Random(0)))
    one_pass(pipeline)
    waits = engine.waits
    for _ in range(3):
        assert one_pass(pipeline) == total
    assert pipeline.scheduler.hit_rate == 0.0
    if count > 1:
        assert engine.waits == waits
    for position in range(total):  # as deep as the cache allows
        pipeline.settle()
        ahead = {(position + i - 1) % total for i in range(count)}
        assert {slot.weight for slot in pipeline.scheduler.slots} == ahead
        pipeline.use(1)


@pytest.mark.parametrize("name", BUILT_IN)
@given(seed=SEEDS, kind=st.sampled_from(ORDERS))
@settings(deadline=None, max_examples=15)
def test_where_all_fits_each_weight_is_filled_once(name: str, seed: int, kind: str) -> None:
    random = Random(seed)
    sizes = [aligned(size) for size in random_sizes(random)]
    pipeline = pipeline_of(make_strategy(name), sizes, len(sizes), seed, kind)
    pipeline.use(4 * len(sizes))
    assert sorted(set(pipeline.filled)) == sorted(pipeline.filled)
    if kind != "random":
        assert sorted(pipeline.filled) == list(range(len(sizes)))


@given(seed=SEEDS, kind=st.sampled_from(ORDERS))
@settings(deadline=None, max_examples=30)
def test_on_demand_fills_nothing_that_nobody_needs(seed: int, kind: str) -> None:
    random = Random(seed)
    sizes = random_sizes(random)
    pipeline = Pipeline(sizes, random_capacity(random, sizes, OnDemand()), OnDemand(), seed)
    pipeline.attach(order_of(kind, len(sizes), random))
    pipeline.settle()
    assert pipeline.filled == []
    pipeline.use(60)
    assert pipeline.foreseen == []
    assert len(pipeline.filled) <= pipeline.scheduler.counters.needs


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(BUILT_IN, 2)))
def test_a_swap_shows_within_one_pass(before: str, after: str) -> None:
    total, count = 20, 12
    pipeline = pipeline_of(make_strategy(before), [512] * total, count, seed=3)
    one_pass(pipeline)
    pipeline.use(7)
    pipeline.swap(make_strategy(after))
    pipeline.use(total - 7)
    fresh = pipeline_of(make_strategy(after), [512] * total, count, seed=3)
    one_pass(fresh)
    one_pass(pipeline)
    if after == "on-demand":
        pipeline.foreseen.clear()
        one_pass(pipeline)
        assert pipeline.foreseen == []
    else:
        assert one_pass(pipeline) == one_pass(fresh) == {"ring": 20, "resident": 16}[after]


@pytest.mark.parametrize("after", ["ring", "on-demand"])
def test_a_swap_takes_standing_grants_back(after: str) -> None:
    """They say nothing of the engine's progress, which is all that the others go by."""
    pipeline = pipeline_of(Resident(), [512] * 6, 6, seed=2)
    one_pass(pipeline)
    assert all(grant.standing for grant in pipeline.lent.values())
    pipeline.swap(make_strategy(after))
    one_pass(pipeline)
    assert not any(grant.standing for grant in pipeline.lent.values())
    assert len(pipeline.filled) == 6  # and what was there is there still


# Strategies that fail --------------------------------------------------------------------------------


class Custom(Strategy):
    """Does what `Ring` does until ``calls`` questions have been asked, and then something else."""

    name = "custom"

    def __init__(self, calls: int, act: Callable[[Custom], Any]) -> None:
        super().__init__()
        self.calls, self.act = calls, act

    def wanted(self, position: int) -> Iterable[int]:
        self.calls -= 1
        answer = self.act(self) if self.calls < 0 else None
        return self.plan.cycle(position) if answer is None else answer


def setting(name: str, value: Any) -> Callable[[Custom], None]:
    return lambda strategy: setattr(strategy, name, value)


def raising(error: BaseException) -> Callable[[Any], Any]:
    def act(_: Any) -> Any:
        raise error

    return act


NONSENSE: dict[str, tuple[Callable[[Custom], Any], str]] = {
    "negative": (lambda _: [-1], "ValueError: wanted -1, which is not a weight (0 to 5)"),
    "too large": (lambda _: [6], "ValueError: wanted 6, which is not a weight (0 to 5)"),
    "text": (lambda _: "0", "ValueError: wanted '0', which is not a weight (0 to 5)"),
    "none in it": (lambda _: [None], "ValueError: wanted None, which"),
    "bool": (lambda _: [True], "ValueError: wanted True, which"),
    "float": (lambda _: [1.0], "ValueError: wanted 1.0, which"),
    "list in it": (lambda _: [[0]], "ValueError: wanted [0], which"),
    "good, then bad": (lambda _: [0, 1, 77], "ValueError: wanted 77, which"),
    "no iterable": (lambda _: 5, "TypeError: 'int' object is not iterable"),
    "endless": (lambda _: itertools.repeat(0), "ValueError: wanted goes on without end"),
    "raises": (raising(KeyError("lost")), "KeyError: 'lost')"),
    "raises without a word": (raising(ValueError()), "ValueError)"),
    "ends the program": (raising(SystemExit(3)), "SystemExit: 3)"),
    "lines": (raising(OSError("one\n  two\n")), "OSError: one two"),
    "deep": (raising(RecursionError("too deep")), "RecursionError: too deep"),
    "half": (lambda _: (6 // (2 - w) for w in range(3)), "ValueError: wanted 6, which"),
    "half way": (lambda _: (1 // (1 - w) for w in range(3)), "ZeroDivisionError: "),
    "keep none": (
        setting("keep", None),
        "TypeError: keep must be a frozenset of weights, not None",
    ),
    "keep list": (setting("keep", [0]), "TypeError: keep must be a frozenset of weights, not list"),
    "keep set": (setting("keep", {0}), "TypeError: keep must be a frozenset of weights, not set"),
    "keep text": (setting("keep", frozenset("0")), "ValueError: keep holds '0', which"),
    "keep none in it": (setting("keep", frozenset([None])), "ValueError: keep holds None, which"),
    "keep negative": (setting("keep", frozenset([-1])), "ValueError: keep holds -1, which"),
    "keep too large": (setting("keep", frozenset([6])), "ValueError: keep holds 6, which"),
    "keep bool": (setting("keep", frozenset([True])), "ValueError: keep holds True, which"),
    "keep gone": (lambda s: delattr(s, "keep"), "AttributeError: 'Custom' object has no attribute"),
    "no method": (setting("wanted", 3), "TypeError: 'int' object is not callable"),
    "changes sizes": (lambda s: s.sizes.clear(), "AttributeError: 'tuple' object has no attribute"),  # type: ignore[attr-defined]
}


def run_on(pipeline: Pipeline, reason: str) -> None:
    """The strategy has failed, which was said in one line, and nobody else notices."""
    pipeline.use(24)
    (line,) = pipeline.fallbacks
    assert line.startswith(f"strategy custom failed ({reason}"), line
    assert line.endswith("); going on with on-demand")
    assert "\n" not in line
    assert pipeline.scheduler.strategy.name == "on-demand"
    pipeline.use(24)
    assert len(pipeline.fallbacks) == 1


@pytest.mark.parametrize("calls", [0, 1, 9])
@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_answered_with_on_demand(what: str, calls: int) -> None:
    act, reason = NONSENSE[what]
    for seed in range(3):
        pipeline = pipeline_of(Custom(calls, act), [512] * 6, 3, seed)
        run_on(pipeline, reason)


@pytest.mark.parametrize("method", ["begin", "needed", "released", "filled", "freed"])
@pytest.mark.parametrize("calls", [0, 5])
def test_a_method_that_raises_is_answered_with_on_demand(method: str, calls: int) -> None:
    left = iter([*range(calls), None])

    def fail(self: Custom, *arguments: Any) -> None:
        if next(left, None) is None:
            raise ArithmeticError("nonsense")
        getattr(Strategy, method)(self, *arguments)

    failing = type("Failing", (Custom,), {method: fail})
    strategy = failing(0, lambda s: s.plan.cycle(0) if method == "needed" else None)
    pipeline = pipeline_of(strategy, [512] * 6, 3, seed=5)
    for _ in range(calls):  # begin is called again whenever the plan changes
        if method == "begin":
            plan = pipeline.scheduler.plan.order
            pipeline.scheduler.set_plan(Plan((*plan[1:], plan[0])))
    run_on(pipeline, "ArithmeticError: nonsense")


@given(seed=SEEDS, what=st.sampled_from(sorted(NONSENSE)), calls=st.integers(0, 60))
@settings(deadline=None, max_examples=40)
def test_nonsense_at_any_moment_of_any_history(seed: int, what: str, calls: int) -> None:
    act, _ = NONSENSE[what]
    history = History(seed, lambda _: Custom(calls, act))
    history.run(500, mishaps=0.01)


def test_a_failure_of_on_demand_itself_is_a_defect() -> None:
    broken = OnDemand()
    broken.wanted = raising(ValueError("broken"))  # type: ignore[method-assign]
    scheduler = Scheduler(Plan((0,)), [512], Capacity(1, 512), broken)
    with pytest.raises(InternalError, match="on-demand failed"):
        scheduler.step()


# Contracts of single calls ---------------------------------------------------------------------------


def test_an_arena_that_does_not_hold_the_largest_weight_is_refused() -> None:
    with pytest.raises(InternalError, match="does not hold the largest weight"):
        Scheduler(Plan((0, 1)), [512, 1024], Capacity(2, 1023), Ring())
    # A slot is aligned: 513 bytes of weight take 1024 of the arena.
    with pytest.raises(InternalError, match="does not hold the largest weight"):
        Scheduler(Plan((0,)), [513], Capacity(1, 1023), Ring())


def test_a_resize_before_all_is_drained_is_refused() -> None:
    pipeline = pipeline_of(Ring(), [512] * 4, 2, seed=0)
    pipeline.use(1)
    for drain in (False, True):
        if drain:
            pipeline.scheduler.drain()
        with pytest.raises(InternalError, match="only when every slot is free"):
            pipeline.scheduler.resize(Capacity(4, 2048), Ring())


def test_stale_releases_are_counted_and_never_obeyed() -> None:
    pipeline = pipeline_of(Ring(), [512] * 4, 4, seed=0)
    pipeline.settle()
    scheduler = pipeline.scheduler
    grants = list(pipeline.lent.values())
    assert len(grants) == 4
    before = [(s.id, s.state, s.generation, s.weight) for s in scheduler.slots]
    stale = [(g.slot, g.generation + step) for g in grants for step in (-1, 1)]
    stale += [(4, 1), (p.MAX_INT, 1), (-1, 1), (0, -1)]
    for slot, generation in stale:
        scheduler.released(slot, generation)
    assert [(s.id, s.state, s.generation, s.weight) for s in scheduler.slots] == before
    assert scheduler.counters.ignored == len(stale)
    scheduler.released(grants[0].slot, grants[0].generation)
    assert scheduler.counters.ignored == len(stale)
    scheduler.released(grants[0].slot, grants[0].generation)  # replayed
    assert scheduler.counters.ignored == len(stale) + 1


def test_generations_start_where_they_are_told() -> None:
    pipeline = Pipeline([512] * 3, Capacity(3, 1536), Ring(), first_generation=1000)
    pipeline.attach(order_of("plan", 3, Random(0)))
    pipeline.settle()
    assert {grant.generation for grant in pipeline.lent.values()} == {1001}


def test_nothing_is_granted_before_an_engine_is_there() -> None:
    pipeline = Pipeline([512] * 3, Capacity(3, 1536), Ring())
    pipeline.settle()
    assert sorted(pipeline.filled) == [0, 1, 2]
    assert pipeline.lent == {}
    assert pipeline.scheduler.full
    pipeline.attach(order_of("plan", 3, Random(0)))
    pipeline.settle()
    assert len(pipeline.lent) == 3


def test_the_next_engine_finds_what_the_last_one_left() -> None:
    pipeline = pipeline_of(Resident(), [512] * 6, 6, seed=4)
    pipeline.use(8)
    pipeline.kill()
    pipeline.detach()
    filled = len(pipeline.filled)
    pipeline.attach(order_of("reverse", 6, Random(0)))
    pipeline.use(12)
    assert len(pipeline.filled) == filled == 6


def test_the_same_weight_twice_in_a_row() -> None:
    """The second need must not be taken for one that crossed the first grant."""
    for seed in range(40):
        pipeline = Pipeline([512] * 4, Capacity(2, 1024), Ring(), seed)
        pipeline.attach(weight for i in itertools.count() for weight in (i % 4, i % 4))
        pipeline.use(30)


def test_a_weight_that_the_plan_does_not_name_is_served() -> None:
    for name in BUILT_IN:
        pipeline = pipeline_of(make_strategy(name), [512] * 6, 2, seed=7, kind="random")
        pipeline.scheduler.set_plan(Plan((3, 1)))
        pipeline.use(60)
        assert set(pipeline.filled) == set(range(6))


def test_full_says_whether_all_that_is_wanted_is_there() -> None:
    pipeline = Pipeline([512] * 4, Capacity(3, 1536), Ring())
    assert not pipeline.scheduler.full
    pipeline.settle()
    assert pipeline.scheduler.full
    pipeline.scheduler.drain()
    assert not pipeline.scheduler.full
