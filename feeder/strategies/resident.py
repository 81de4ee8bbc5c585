"""``resident``: the best split for a cyclic plan. Most weights stay; the rest cycles through few slots.

For a cyclic order no policy hits more than (N - k)/M, with k of the N slots left to stream through
(M weights in the plan): LRU and FIFO hit nothing, because each evicts what is needed soonest.

Where slots are dequantized and memory is short, packed copies on the device save the link four times as
much as slots would: weights get a copy until what crosses the link is hidden behind what the device does,
then there are more slots to stream through; when all have a copy, as many as still fit get a slot instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from common.plan import Capacity, Plan, largest_window_bytes
from feeder.strategies.cyclic import Cyclic

#: Slots to stream through, where they are counted. Packed ones have nothing but each other to keep the link
#: busy: measured on an H100, eight do at 99 % of its bandwidth, four at 87.
STREAM_SLOTS = 8
#: Where bytes count, room for so many of the largest that follow each other, which is one read, one granted,
#: two on the link and one to spare; as a rule that is room for twice as many.
STREAM_WINDOW = 5
#: The same where most fills come from copies on the device, and what a pass at least takes with so many, as a
#: share of the time in which all would cross the link: what is left to hide is the hand-over, and that two
#: processes take turns on the device. Of that a share is not hidden behind the link, either. Measured on an
#: H100 with the 32B shape: where the link is far slower, fewer slots and more copies may gain some
#: percent.
NEAR_SLOTS = ((16, 0.22), (8, 0.28), (STREAM_WINDOW, 0.65))
NOT_HIDDEN = 0.1
SPLIT_BITS = 8  # how finely memory is split between slots and copies: in parts of 1/256


def stream_slots(count: int, total: int) -> int:
    """How many of ``count`` slots stream when ``total`` weights do not all fit."""
    if count >= total:
        return 0
    return min(STREAM_SLOTS, count, total - count + 1)


def spread(candidates: Sequence[int], count: int) -> frozenset[int]:
    """``count`` of ``candidates``, as evenly spaced as whole numbers allow."""
    total = len(candidates)
    return frozenset(
        candidates[i] for i in range(total) if (i + 1) * count // total > i * count // total
    )


class Resident(Cyclic):
    """Keeps an evenly spread set, so that the link is busy through the whole pass."""

    name = "resident"

    def arena_bytes(self, plan: Plan, sizes: Sequence[int], count: int) -> int:
        keep = _keep_by_count(plan, count)
        return _split_bytes(plan, sizes, keep, stream_slots(count, len(plan)))

    def copies(
        self, plan: Plan, sizes: Sequence[int], packed_sizes: Sequence[int], size_bytes: int
    ) -> frozenset[int]:
        if sum(sizes[weight] for weight in plan.order) <= size_bytes:
            return frozenset()
        choices = []
        for streaming, least in NEAR_SLOTS:  # the link and the device work at the same time
            split = _Split(plan, sizes, packed_sizes, size_bytes, streaming)
            if arenas := split.smallest():
                best = max(arenas, key=split.near_bytes)
                cost = max(least, split.far_share(best)) + NOT_HIDDEN * least
                choices.append((cost, split, best))
        if not choices:
            return frozenset()
        _, split, best = min(choices, key=lambda choice: choice[0])
        low, high = best, size_bytes  # the largest arena beside which all others have a copy
        while split.all_near(best) and high - low > size_bytes >> SPLIT_BITS:
            middle = (low + high) // 2
            low, high = (middle, high) if split.all_near(middle) else (low, middle)
        return split.copies(max(low, size_bytes, key=split.near_bytes))

    def begin(self, plan: Plan, sizes: Sequence[int], capacity: Capacity) -> None:
        super().begin(plan, sizes, capacity)
        keep = _keep_by_count(plan, capacity.count)
        streaming = stream_slots(capacity.count, len(plan))
        if self.copied:
            # The most that there is room for: `copies` has seen to that.
            for streaming, _ in NEAR_SLOTS:
                keep = _keep_by_bytes(plan, sizes, capacity, streaming, self.copied)
                if _split_bytes(plan, sizes, keep, streaming) <= capacity.size_bytes:
                    break
        elif _split_bytes(plan, sizes, keep, streaming) > capacity.size_bytes:
            keep = _keep_by_bytes(plan, sizes, capacity)
        self.keep = keep


class _Split:
    """Memory of ``size_bytes`` for an arena of slots and, in the rest, packed copies. ``streaming``:
    weights that are to find a slot at once beside those that stay."""

    def __init__(
        self,
        plan: Plan,
        sizes: Sequence[int],
        packed_sizes: Sequence[int],
        size_bytes: int,
        streaming: int,
    ) -> None:
        self._plan, self._sizes, self._packed = plan, sizes, packed_sizes
        self._size_bytes, self._streaming = size_bytes, streaming

    def smallest(self) -> list[int]:
        """Arenas in which only the weights larger than a threshold stay."""
        order, sizes, found = self._plan.order, self._sizes, []
        for threshold in {sizes[weight] for weight in order}:
            keep = frozenset(weight for weight in order if sizes[weight] > threshold)
            streaming = min(self._streaming, len(order) - len(keep))
            found.append(_split_bytes(self._plan, sizes, keep, streaming))
        return [arena for arena in found if arena <= self._size_bytes]

    def keep(self, arena: int) -> frozenset[int]:
        """What stays in slots."""
        capacity = Capacity(len(self._plan), arena)
        return _keep_by_bytes(self._plan, self._sizes, capacity, self._streaming)

    def copies(self, arena: int) -> frozenset[int]:
        """As many of the others as there is room for beside the arena, evenly spread."""
        keep, room = self.keep(arena), self._size_bytes - arena
        rest = [weight for weight in self._plan.order if weight not in keep]
        low, high = 0, len(rest)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if self._bytes(spread(rest, middle)) <= room else (low, middle - 1)
            )
        return spread(rest, low)

    def near_bytes(self, arena: int) -> int:
        """Packed bytes that need not cross the link."""
        return self._bytes(self.keep(arena) | self.copies(arena))

    def far_share(self, arena: int) -> float:
        """Of all packed bytes, those that cross the link in each pass."""
        return 1 - self.near_bytes(arena) / self._bytes(self._plan.order)

    def all_near(self, arena: int) -> bool:
        return self.near_bytes(arena) == self._bytes(self._plan.order)

    def _bytes(self, weights: Iterable[int]) -> int:
        return sum(self._packed[weight] for weight in weights)


def _keep_by_count(plan: Plan, count: int) -> frozenset[int]:
    total = len(plan)
    return spread(plan.order, min(count, total) - stream_slots(count, total))


def _keep_by_bytes(
    plan: Plan,
    sizes: Sequence[int],
    capacity: Capacity,
    most: int = STREAM_WINDOW,
    without: frozenset[int] = frozenset(),
) -> frozenset[int]:
    """The set, none of it in ``without``, that keeps the most bytes while what streams has its slots,
    ``most`` of them if there are so many weights.

    A weight far larger than the others would force a stream area of its size, so every set "all
    that is larger than a threshold stays" is tried, and what room is left is spread over the rest.
    """
    total = len(plan)

    def fits(keep: frozenset[int]) -> bool:
        streaming = min(most, total - len(keep))
        return (
            len(keep) + streaming <= capacity.count
            and _split_bytes(plan, sizes, keep, streaming) <= capacity.size_bytes
        )

    order = [w for w in plan.order if w not in without]
    best: frozenset[int] = frozenset()
    for threshold in sorted({sizes[w] for w in order}, reverse=True):
        large = frozenset(w for w in order if sizes[w] > threshold)
        rest = [w for w in order if sizes[w] <= threshold]
        if not fits(large):
            continue
        low, high = 0, len(rest)
        while low < high:  # the most of the rest that can stay
            middle = (low + high + 1) // 2
            fit = fits(large | spread(rest, middle))
            low, high = (middle, high) if fit else (low, middle - 1)
        keep = large | spread(rest, low)
        best = max(best, keep, key=lambda chosen: sum(sizes[w] for w in chosen))
    return best


def _split_bytes(plan: Plan, sizes: Sequence[int], keep: frozenset[int], streaming: int) -> int:
    """Bytes of the weights that stay and of ``streaming`` consecutive ones of those that do not."""
    streamed = [w for w in plan.order if w not in keep]
    kept_bytes = sum(sizes[w] for w in keep)
    if not streamed:
        return kept_bytes
    return kept_bytes + largest_window_bytes(streamed, sizes, max(1, streaming))
