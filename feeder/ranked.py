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
        self._keys: list[int] = []  # sorted; hundreds at most, so that moving them is nothing
        self._key_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[int]:
        """In order. Must not change meanwhile."""
        return map(weight_of, self._keys)

    @property
    def keys(self) -> list[int]:
        """Sorted; to be read only."""
        return self._keys

    def put(self, weight: int, rank: int) -> None:
        """Add the weight, or change its rank."""
        key = key_of(weight, rank)
        former = self._key_of.get(weight)
        if former == key:
            return
        if former is not None:
            del self._keys[bisect_left(self._keys, former)]
        self._key_of[weight] = key
        insort(self._keys, key)

    def discard(self, weight: int) -> None:
        key = self._key_of.pop(weight, None)
        if key is not None:
            del self._keys[bisect_left(self._keys, key)]

    def first(self) -> int:
        """The weight of the lowest rank. IndexError if there is none."""
        return weight_of(self._keys[0])

    def after(self, key: int) -> int | None:
        """The smallest key above ``key``."""
        at = bisect_right(self._keys, key)
        return self._keys[at] if at < len(self._keys) else None

    def clear(self) -> None:
        self._keys.clear()
        self._key_of.clear()
