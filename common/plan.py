"""The plan: the cyclic order in which one forward pass uses the weights. Knows nothing of memory.

A weight is an index into the store's list of weights. The plan predicts and does not constrain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Capacity:
    """How much may be in slots at once: ``count`` weights and ``size_bytes`` bytes, both bounds hold."""

    count: int
    size_bytes: int

    def __post_init__(self) -> None:
        if self.count < 1 or self.size_bytes < 1:
            raise ValueError(f"a capacity holds at least one weight, not {self}")

    def holds(self, sizes: Sequence[int]) -> bool:
        """Whether weights of ``sizes`` bytes fit all at once."""
        return self.count >= len(sizes) and self.size_bytes >= sum(sizes)


@dataclass(frozen=True)
class Plan:
    """``order``: weights in order of use, each once."""

    order: tuple[int, ...]
    _position: dict[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        positions = {weight: i for i, weight in enumerate(self.order)}
        if not positions or len(positions) != len(self.order):
            raise ValueError("a plan names at least one weight, and each weight once")
        object.__setattr__(self, "_position", positions)

    def __len__(self) -> int:
        return len(self.order)

    def position(self, weight: int) -> int | None:
        """Where in the pass ``weight`` is used; None if the plan does not know it."""
        return self._position.get(weight)

    def after(self, weight: int) -> int | None:
        """The position that follows ``weight``'s, cyclically; None if the plan does not know it."""
        here = self._position.get(weight)
        return None if here is None else (here + 1) % len(self.order)

    def cycle(self, start: int) -> Iterator[int]:
        """All weights once, from position ``start`` on and round."""
        yield from self.order[start:]
        yield from self.order[:start]


def largest_window_bytes(order: Sequence[int], sizes: Sequence[int], count: int) -> int:
    """The most bytes that ``count`` weights, consecutive in the cyclic ``order``, take together."""
    total = len(order)
    if count >= total:
        return sum(sizes[w] for w in order)
    window = sum(sizes[w] for w in order[:count])
    largest = window
    for start in range(total):
        window += sizes[order[(start + count) % total]] - sizes[order[start]]
        largest = max(largest, window)
    return largest
