"""Strategies by themselves, and how a user's own is found, loaded and refused."""

from __future__ import annotations

from itertools import accumulate, islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import StrategyError
from common.plan import Capacity, Plan, largest_window_bytes
from feeder.strategies.on_demand import OnDemand
from feeder.strategies.registry import BUILT_IN, make_strategy
from feeder.strategies.resident import (
    STREAM_SLOTS,
    STREAM_WINDOW,
    Resident,
    spread,
    stream_slots,
)
from feeder.strategies.ring import Ring

PLANS = st.permutations(range(12)).flatmap(
    lambda order: st.integers(1, 12).map(lambda count: Plan(tuple(order[:count])))
)
SIZES = st.lists(st.integers(1, 40).map(lambda units: units * 512), min_size=12, max_size=12)


@given(plan=PLANS, position=st.integers(0, 11))
def test_ring_wants_the_plan_from_where_the_engine_is(plan: Plan, position: int) -> None:
    ring = Ring()
    ring.begin(plan, [512] * 12, Capacity(1, 512))
    here = position % len(plan)
    assert tuple(ring.wanted(here)) == plan.order[here:] + plan.order[:here]
    assert ring.keep == frozenset()


@given(total=st.integers(1, 60), data=st.data())
def test_spread_is_even(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    candidates = [100 + i for i in range(total)]
    chosen = sorted(spread(candidates, count))
    assert len(chosen) == count
    assert set(chosen) <= set(candidates)
    if count > 1:
        gaps = [b - a for a, b in zip(chosen, [*chosen[1:], chosen[0] + total], strict=True)]
        assert max(gaps) - min(gaps) <= 1


@given(total=st.integers(1, 60), data=st.data())
def test_what_streams_has_slots_and_the_rest_stays(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, total))
    streaming = stream_slots(count, total)
    if count == total:
        assert streaming == 0
        return
    assert 1 <= streaming <= min(count, STREAM_SLOTS)
    # No more slots stream than there are weights to stream, or some would be better kept.
    assert streaming <= total - (count - streaming)
    if count >= STREAM_SLOTS and total - count >= STREAM_SLOTS - 1:
        assert streaming == STREAM_SLOTS


@given(plan=PLANS, sizes=SIZES, data=st.data())
@settings(deadline=None)
def test_resident_keeps_what_fits_beside_the_stream(
    plan: Plan, sizes: list[int], data: st.DataObject
) -> None:
    total = len(plan)
    count = data.draw(st.integers(1, total))
    resident = Resident()
    needed = resident.arena_bytes(plan, sizes, count)
    largest = max(sizes[weight] for weight in plan.order)
    resident.begin(plan, sizes, Capacity(count, max(needed, largest)))
    # Bounded by their number: exactly as many stay as the optimum wants.
    assert len(resident.keep) == count - stream_slots(count, total)
    # Bounded by bytes: what stays and what streams fit together, whatever the bound.
    capacity = Capacity(total, data.draw(st.integers(largest, sum(sizes))))
    resident.begin(plan, sizes, capacity)
    kept, streamed = resident.keep, [w for w in plan.order if w not in resident.keep]
    assert kept <= set(plan.order)
    if kept and streamed:
        window = largest_window_bytes(streamed, sizes, min(STREAM_WINDOW, len(streamed)))
        assert sum(sizes[w] for w in kept) + window <= capacity.size_bytes
    if capacity.size_bytes >= sum(sizes[w] for w in plan.order):
        assert kept == set(plan.order)


@given(plan=PLANS, sizes=SIZES, data=st.data())
@settings(deadline=None)
def test_resident_wants_no_more_than_fits(
    plan: Plan, sizes: list[int], data: st.DataObject
) -> None:
    resident = Resident()
    largest = max(sizes[weight] for weight in plan.order)
    count = data.draw(st.integers(1, len(plan)) | st.just(len(plan)))
    capacity = Capacity(count, data.draw(st.integers(largest, sum(sizes))))
    resident.begin(plan, sizes, capacity)
    here = data.draw(st.integers(0, len(plan) - 1))
    answer = list(resident.wanted(here))
    assert sorted(answer) == sorted(plan.order)  # it goes on after what fits
    totals = accumulate(sizes[weight] for weight in answer)
    fits = sum(total <= capacity.size_bytes for total in totals)
    wanted = answer[: min(fits, count)]
    assert resident.keep <= set(wanted)
    ahead = [w for w in (*plan.order[here:], *plan.order[:here]) if w not in resident.keep]
    streamed = [w for w in wanted if w not in resident.keep]
    assert streamed == ahead[: len(streamed)]  # in order, none is skipped
    assert streamed or not ahead  # and what comes next is always among them
    assert [w for w in answer if w not in resident.keep] == ahead


def test_resident_keeps_the_large_where_a_small_stream_gains_more() -> None:
    """One weight far larger than the others would need a stream area of its size."""
    sizes = [512] * 20 + [512 * 15]
    resident = Resident()
    resident.begin(Plan(tuple(range(21))), sizes, Capacity(21, 512 * 25))
    assert 20 in resident.keep
    assert len(resident.keep) == 1 + (25 - 15 - STREAM_WINDOW)


def test_resident_streams_in_order_where_a_smaller_one_would_still_fit() -> None:
    sizes = [512 * size for size in (3, 3, 1, 1, 1, 1, 3, 3, 3, 1)]
    resident = Resident()
    resident.begin(Plan(tuple(range(10))), sizes, Capacity(10, 512 * 17))
    assert resident.keep
    for here in range(10):
        ahead = [(here + i) % 10 for i in range(10) if (here + i) % 10 not in resident.keep]
        streamed = [weight for weight in resident.wanted(here) if weight not in resident.keep]
        assert streamed == ahead


def test_on_demand_wants_what_was_used_last() -> None:
    strategy = OnDemand()
    strategy.begin(Plan((0, 1, 2, 3)), [512] * 4, Capacity(4, 2048))
    assert list(strategy.wanted(0)) == []
    for weight in (0, 1, 2):
        strategy.filled(weight)
    strategy.released(0)
    assert list(strategy.wanted(3)) == [0, 2, 1]
    strategy.freed(2)
    strategy.needed(3)
    assert list(strategy.wanted(0)) == [0, 1]


# A user's own ----------------------------------------------------------------------------------------

GOOD = """
from feeder.strategies.base import Strategy

class Mine(Strategy):
    name = "mine"
    def wanted(self, position):
        return self.plan.order
"""


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_built_in_are_found_by_name(name: str) -> None:
    strategy = make_strategy(name)
    assert type(strategy) is BUILT_IN[name]
    assert strategy.name == strategy.spec == name
    assert make_strategy(name) is not strategy


def test_the_names_are_those_that_are_documented() -> None:
    assert set(BUILT_IN) == {"ring", "resident", "on-demand"}


def test_a_users_own_is_loaded_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "my strategy:1.py"
    file.write_text(GOOD)
    strategy = make_strategy(f"{file}:Mine")
    assert strategy.name == "mine"
    strategy.begin(Plan((2, 0)), [1, 1, 1], Capacity(1, 1))
    assert list(islice(strategy.wanted(0), 5)) == [2, 0]
    # Asked for by its spec again, it is read again: a user may have mended it.
    file.write_text(GOOD.replace('"mine"', '"mended"'))
    assert make_strategy(strategy.spec).name == "mended"


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "rings",
        "Ring",
        "ring ",
        "file.py",
        "file.py:",
        ":Mine",
        "mine.txt:Mine",
        "x" * 4096,
        "\0:X",
    ],
)
def test_an_unknown_name_is_refused(spec: str) -> None:
    with pytest.raises(StrategyError, match="name one of ring, resident, on-demand, or a class as"):
        make_strategy(spec)


@pytest.mark.parametrize("path", ["absent.py", "n" * 5000 + ".py", "nul\0.py", "a/b/c.py"])
def test_a_file_that_is_not_there_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(StrategyError, match="does not exist: check the path"):
        make_strategy(f"{tmp_path}/{path}:Mine")


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "dir.py").mkdir()
    with pytest.raises(StrategyError, match="does not exist"):
        make_strategy(f"{tmp_path}/dir.py:Mine")


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("def (", "fails to import: SyntaxError"),
        ("import nothing_of_that_name", "fails to import: ModuleNotFoundError"),
        ("1 / 0", "fails to import: ZeroDivisionError"),
        ("raise SystemExit", "fails to import: SystemExit$"),
        ("\0", "fails to import: "),
        ("", "has no class Mine derived from feeder.strategies.base.Strategy"),
        ("Mine = 3", "has no class Mine derived"),
        ("class Mine: pass", "has no class Mine derived"),
        ("def Mine(): pass", "has no class Mine derived"),
        (GOOD + "    def __init__(self): raise OSError('disk')", r"Mine\(\) of .* raises OSError"),
        (GOOD + "    def __init__(self): raise SystemExit", r"Mine\(\) of .* raises SystemExit"),
        (GOOD + "    def __init__(self, argument): pass", r"Mine\(\) of .* raises TypeError"),
        ("def x(:", r"fails to import: SyntaxError: invalid syntax \(mine.py, line 1\)$"),
        (
            GOOD.replace("def wanted", "def desired"),
            r"Mine of .* has no method wanted\(self, position\)",
        ),
        (GOOD.replace('"mine"', "3"), "Mine.name of .* is no text of 1 to 64 characters"),
        (GOOD.replace('"mine"', '""'), "Mine.name of .* is no text"),
        (GOOD.replace('"mine"', '"m" * 65'), "Mine.name of .* is no text"),
        (GOOD.replace('"mine"', r'"two\nlines"'), "Mine.name of .* is no text"),
        (GOOD.replace('"mine"', r'"\ud800"'), "Mine.name of .* is no text"),
    ],
)
def test_a_file_that_is_no_good_is_refused(tmp_path: Path, code: str, problem: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(code)
    with pytest.raises(StrategyError, match=problem):
        make_strategy(f"{file}:Mine")
