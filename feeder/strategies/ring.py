"""``ring``: everything cycles, prefetched in plan order as deep as the cache allows."""

from __future__ import annotations

from feeder.strategies.cyclic import Cyclic


class Ring(Cyclic):
    """A window of the plan, starting where the engine is. Hits nothing unless everything fits."""

    name = "ring"
