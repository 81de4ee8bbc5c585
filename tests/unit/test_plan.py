"""Plans and capacities: pure arithmetic, against brute force."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.plan import Capacity, Plan, largest_window_bytes

ORDERS = st.lists(st.integers(0, 30), min_size=1, max_size=12, unique=True)


@given(order=ORDERS, seed=st.integers(0, 99), count=st.integers(1, 15))
def test_largest_window_equals_brute_force(order: list[int], seed: int, count: int) -> None:
    sizes = [random.Random(seed + weight).randint(1, 10**10) for weight in range(31)]
    total = len(order)
    windows = [
        {order[(start + i) % total] for i in range(min(count, total))} for start in range(total)
    ]
    expected = max(sum(sizes[weight] for weight in window) for window in windows)
    assert largest_window_bytes(order, sizes, count) == expected


def test_a_window_goes_round_the_end_of_the_pass() -> None:
    assert largest_window_bytes([2, 0, 1], [70, 1, 900], 2) == 970
    assert largest_window_bytes([0, 1, 2, 3], [500, 1, 1, 300], 2) == 800


@given(order=ORDERS)
def test_a_plan_knows_its_order(order: list[int]) -> None:
    plan = Plan(tuple(order))
    assert len(plan) == len(order)
    for position, weight in enumerate(order):
        assert plan.position(weight) == position
        assert plan.after(weight) == (position + 1) % len(order)
        assert list(plan.cycle(position)) == order[position:] + order[:position]
    for weight in set(range(-1, 33)) - set(order):
        assert plan.position(weight) is None
        assert plan.after(weight) is None


def test_plans_are_equal_by_their_order() -> None:
    assert Plan((3, 1)) == Plan((3, 1))
    assert Plan((3, 1)) != Plan((1, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plan((3, 1)).order = (1,)  # type: ignore[misc]


@pytest.mark.parametrize("order", [(), (1, 1), (0, 4, 2, 4)])
def test_a_plan_names_each_weight_once(order: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="names at least one weight, and each weight once"):
        Plan(order)


@pytest.mark.parametrize(("count", "size_bytes"), [(0, 1), (1, 0), (-1, 5), (5, -1), (0, 0)])
def test_a_capacity_holds_something(count: int, size_bytes: int) -> None:
    with pytest.raises(ValueError, match="a capacity holds at least one weight"):
        Capacity(count, size_bytes)


def test_the_smallest_capacity() -> None:
    assert (Capacity(1, 1).count, Capacity(1, 1).size_bytes) == (1, 1)
