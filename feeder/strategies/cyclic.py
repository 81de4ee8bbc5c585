"""What ``ring`` and ``resident`` have in common: some weights stay, the others pass in plan order."""

from __future__ import annotations

from collections.abc import Iterable

from feeder.strategies.base import Strategy


class Cyclic(Strategy):
    """Wants what is in ``keep``, and of the plan's other weights as many as fit beside, from the
    position on. ``keep`` is of the plan and fits the capacity.

    The scheduler knows this ``wanted`` and follows it without asking again at every weight
    (`feeder.target.Window`), unless a subclass has one of its own.
    """

    def wanted(self, position: int) -> Iterable[int]:
        keep, sizes = self.keep, self.sizes
        count = self.capacity.count - len(keep)
        room = self.capacity.size_bytes - sum(sizes[weight] for weight in keep)
        later: list[int] = []
        for weight in self.plan.cycle(position):
            if weight in keep:
                yield weight
                continue
            count -= 1
            room -= sizes[weight]
            if count < 0 or room < 0 or later:  # streamed weights are fetched in order
                later.append(weight)
            else:
                yield weight
        yield from later
