"""The target that is followed piece by piece is the one that asking anew would give."""

from __future__ import annotations

from itertools import chain

from hypothesis import given, settings
from hypothesis import strategies as st

from common.plan import Capacity, Plan
from feeder.ranked import FIRST, Ranked, key_of, weight_of
from feeder.strategies.cyclic import Cyclic
from feeder.strategies.on_demand import OnDemand
from feeder.target import Listed, Recent, Window

TOTAL = 12


@st.composite
def situations(draw: st.DrawFn) -> tuple[Plan, list[int], Capacity, frozenset[int]]:
    order = draw(st.permutations(range(TOTAL)))[: draw(st.integers(1, TOTAL))]
    sizes = draw(st.lists(st.integers(1, 9), min_size=TOTAL, max_size=TOTAL))
    keep = frozenset(draw(st.lists(st.sampled_from(order), max_size=len(order))))
    kept_bytes = sum(sizes[weight] for weight in keep)
    count = draw(st.integers(max(1, len(keep)), TOTAL))
    capacity = Capacity(count, draw(st.integers(max(1, kept_bytes), sum(sizes) + 1)))
    return Plan(tuple(order)), sizes, capacity, keep


def asked(
    plan: Plan, sizes: list[int], capacity: Capacity, keep: frozenset[int], position: int
) -> Listed:
    strategy = Cyclic()
    strategy.begin(plan, sizes, capacity)
    strategy.keep = keep
    return Listed(iter(strategy.wanted(position)), sizes, capacity)


@given(situation=situations(), moves=st.lists(st.integers(0, TOTAL - 1), max_size=25))
@settings(deadline=None, max_examples=300)
def test_a_window_follows_as_if_it_were_asked(
    situation: tuple[Plan, list[int], Capacity, frozenset[int]], moves: list[int]
) -> None:
    plan, sizes, capacity, keep = situation
    window = Window(plan, sizes, capacity, keep, 0)
    assert window.usable
    for position in chain([0], (move % len(plan) for move in moves)):
        before = {weight: window.rank(weight) for weight in window.members}
        changed = window.move(position)
        expected = asked(plan, sizes, capacity, keep, position)
        assert sorted(window.members, key=window.rank) == list(expected.members)
        assert list(window.beyond()) == list(expected.beyond())
        if changed is not None:
            after = {weight: window.rank(weight) for weight in window.members}
            assert {w for w, _ in before.items() ^ after.items()} <= set(changed)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=TOTAL, max_size=TOTAL),
    events=st.lists(st.lists(st.integers(0, TOTAL - 1), max_size=4), max_size=25),
    count=st.integers(1, TOTAL), size_bytes=st.integers(9, 60), data=st.data(),
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_on_demand_is_followed_as_if_it_were_asked(
    sizes: list[int], events: list[list[int]], count: int, size_bytes: int, data: st.DataObject
) -> None:
    strategy, capacity = OnDemand(), Capacity(count, size_bytes)
    target = Recent(strategy.recent, sizes, capacity, None)
    for weights in events:
        for weight in weights:
            data.draw(st.sampled_from([strategy.filled, strategy.released, strategy.freed]))(weight)
        need = data.draw(st.none() | st.integers(0, TOTAL - 1))
        before = set(target.members)
        concerned = target.follow(weights, need)
        wishes = [*([] if need is None else [need]), *strategy.wanted(0)]
        expected = Listed(iter(wishes), sizes, capacity)
        assert target.members == expected.members.keys()
        assert before ^ target.members <= concerned
        first = [] if need is None else [need]
        ranked = sorted(target.members - set(first), key=target.rank)
        assert [*first, *ranked] == list(expected.members)


@given(situation=situations(), stranger=st.integers(0, TOTAL - 1))
def test_a_window_says_where_it_cannot_follow(
    situation: tuple[Plan, list[int], Capacity, frozenset[int]], stranger: int
) -> None:
    plan, sizes, capacity, keep = situation
    more = keep | {stranger}
    fits = (
        len(more) <= capacity.count
        and sum(sizes[weight] for weight in more) <= capacity.size_bytes
        and stranger in plan.order
    )
    assert Window(plan, sizes, capacity, more, 0).usable == fits


@given(st.lists(st.integers(0, 30), max_size=30), st.integers(1, 9), st.integers(1, 60))
def test_a_list_is_the_longest_prefix_that_fits(
    wishes: list[int], count: int, size_bytes: int
) -> None:
    sizes = [1 + weight % 5 for weight in range(31)]
    target = Listed(iter(wishes), sizes, Capacity(count, size_bytes))
    distinct = list(dict.fromkeys(wishes))
    members = list(target.members)
    longer = distinct[: len(members) + 1]
    assert members == distinct[: len(members)]
    assert len(members) <= count and sum(sizes[w] for w in members) <= size_bytes
    if longer != members:
        assert len(longer) > count or sum(sizes[w] for w in longer) > size_bytes
    for _ in range(2):  # asked twice, it says the same
        assert list(target.beyond()) == distinct[len(members) :]


def test_a_list_reads_no_further_than_it_must() -> None:
    read = []

    def wishes():  # type: ignore[no-untyped-def]
        for weight in range(9):
            read.append(weight)
            yield weight

    target = Listed(wishes(), [1] * 9, Capacity(3, 9))
    assert read == [0, 1, 2, 3]
    beyond = target.beyond()
    assert [next(beyond), next(beyond)] == [3, 4]
    assert read == [0, 1, 2, 3, 4]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 99) | st.none())))
def test_ranked_weights_come_in_the_order_of_their_ranks(
    changes: list[tuple[int, int | None]],
) -> None:
    ranked, model = Ranked(), dict[int, int]()
    for weight, rank in changes:
        if rank is None:
            ranked.discard(weight)
            model.pop(weight, None)
        else:
            ranked.put(weight, rank)
            model[weight] = rank
    expected = sorted(model, key=lambda weight: (model[weight], weight))
    assert list(ranked) == expected and len(ranked) == len(expected)
    assert [weight_of(key) for key in ranked.keys] == expected
    found, key = [], FIRST
    while (after := ranked.after(key)) is not None:
        found.append(weight_of(after))
        key = after
    assert found == expected
    if expected:
        assert ranked.first() == expected[0]
        assert ranked.after(key_of(expected[-1], model[expected[-1]])) is None
