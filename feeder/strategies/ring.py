"""``ring``: everything cycles, prefetched in plan order as deep as the cache allows."""

from __future__ import annotations

from collections.abc import Iterable

from feeder.strategies.base import Strategy


class Ring(Strategy):
    """A window of the plan, starting where the engine is. Hits nothing unless everything fits."""

    name = "ring"

    def wanted(self, position: int) -> Iterable[int]:
        return self.plan.cycle(position)
