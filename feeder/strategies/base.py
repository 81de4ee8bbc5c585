"""What a strategy is. See docs/strategies.md for how to write one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from common.plan import Capacity, Plan, largest_window_bytes


class Strategy:
    """Answers, at any moment, which weights should be in slots, most urgent first.

    The feeder fills the longest prefix of ``wanted`` that the capacity holds and takes back what is
    not in it when it needs the room. A weight that the engine is waiting for always goes first,
    whatever the strategy says. Everything a strategy knows comes through these methods.
    """

    name = "strategy"
    spec = ""  # what it was asked for by: its name, or path/to/file.py:Class

    def __init__(self) -> None:
        self.plan: Plan
        self.sizes: Sequence[int]
        self.capacity: Capacity
        #: Weights of which a packed copy is, or will be, on the device: what ``copies`` answered.
        self.copied: frozenset[int] = frozenset()
        #: Weights that stay: granted once, without a message at each use, until they leave the set.
        self.keep: frozenset[int] = frozenset()

    def arena_bytes(self, plan: Plan, sizes: Sequence[int], count: int) -> int:
        """Bytes that ``count`` weights need under this strategy when only their number is bounded."""
        return largest_window_bytes(plan.order, sizes, count)

    def slot_format(self, weight: int, usual: str) -> str:
        """What ``weight`` is in its slot: "packed" or "dequantized". ``usual``: what --slots says. Asked
        when the slots are laid out, before ``begin``; a weight that cannot be packed never is."""
        return usual

    def copies(
        self, plan: Plan, sizes: Sequence[int], packed_sizes: Sequence[int], size_bytes: int
    ) -> frozenset[int]:
        """Weights of which a packed copy, of ``packed_sizes[weight]`` bytes, is to stay on the device
        beside the slots: filling their slots crosses no link. Asked when memory is shared out, if
        slots are dequantized and bytes bound them: copies and slots share ``size_bytes``."""
        return frozenset()

    def begin(self, plan: Plan, sizes: Sequence[int], capacity: Capacity) -> None:
        """Called at the start, and again when the plan or the capacity changes.

        ``sizes``: bytes of each weight in a slot, by weight.
        """
        self.plan, self.sizes, self.capacity = plan, sizes, capacity

    def wanted(self, position: int) -> Iterable[int]:
        """Weights that should be in slots, most urgent first; ``position``: where the engine is."""
        raise NotImplementedError

    def needed(self, weight: int) -> None:
        """The engine is waiting for ``weight``."""

    def released(self, weight: int) -> None:
        """The engine has used ``weight`` (not called for weights in ``keep``)."""

    def filled(self, weight: int) -> None:
        """``weight`` has arrived in a slot."""

    def freed(self, weight: int) -> None:
        """``weight`` has left its slot."""
