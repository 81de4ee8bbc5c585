"""``on-demand``: nothing is fetched before it is needed. The baseline that shows what prefetch is worth."""

from __future__ import annotations

from collections.abc import Iterable

from feeder.strategies.base import Strategy


class OnDemand(Strategy):
    """Keeps the most recently used weights (LRU), fetches none ahead."""

    name = "on-demand"

    def __init__(self) -> None:
        super().__init__()
        self.recent: dict[int, None] = {}  # an ordered set; the most recent last

    def wanted(self, position: int) -> Iterable[int]:
        return reversed(self.recent)

    def filled(self, weight: int) -> None:
        self._touch(weight)

    def released(self, weight: int) -> None:
        self._touch(weight)

    def freed(self, weight: int) -> None:
        self.recent.pop(weight, None)

    def _touch(self, weight: int) -> None:
        self.recent.pop(weight, None)
        self.recent[weight] = None
