"""Weights in an order of their own, kept sorted: what the scheduler looks at instead of every slot."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator

_SHIFT = 24
_MASK = (1 << _SHIFT) - 1
FIRST = -(1 << 62)  # before every key


def key_of(weight: int, rank: int) -> int:
    """One number that sorts by rank. Ranks of one moment are distinct, so weights never decide."""
    return (rank << _SHIFT) | weight


def weight_of(key: int) -> int:
    return key & _MASK


class Ranked:
    """A set of weights, each with a rank, read in the order of ranks."""

    def __init__(self) -> None:
        #: Sorted, to be read only. Hundreds at most, so that moving them is nothing.
        self.keys: list[int] = []
        self._key_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[int]:
        """In order. Must not change meanwhile."""
        return map(weight_of, self.keys)

    def put(self, weight: int, rank: int) -> None:
        """Add the weight, or change its rank."""
        key = key_of(weight, rank)
        former = self._key_of.get(weight)
        if former == key:
            return
        if former is not None:
            del self.keys[bisect_left(self.keys, former)]
        self._key_of[weight] = key
        insort(self.keys, key)

    def discard(self, weight: int) -> None:
        key = self._key_of.pop(weight, None)
        if key is not None:
            del self.keys[bisect_left(self.keys, key)]

    def first(self) -> int:
        """The weight of the lowest rank. IndexError if there is none."""
        return weight_of(self.keys[0])

    def after(self, key: int) -> int | None:
        """The smallest key above ``key``."""
        at = bisect_right(self.keys, key)
        return self.keys[at] if at < len(self.keys) else None

    def clear(self) -> None:
        self.keys.clear()
        self._key_of.clear()
