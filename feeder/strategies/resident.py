"""``resident``: the best split for a cyclic plan. Most weights stay; the rest cycles through few slots.

For a cyclic order no policy hits more than (N - k)/M, with k of the N slots left to stream through
(M weights in the plan): LRU and FIFO hit nothing, because each evicts what is needed soonest.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.plan import Capacity, Plan, largest_window_bytes
from feeder.strategies.cyclic import Cyclic

STREAM_SLOTS = 4  # one read, one granted, two on the link: enough to keep the link busy


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

    def begin(self, plan: Plan, sizes: Sequence[int], capacity: Capacity) -> None:
        super().begin(plan, sizes, capacity)
        keep = _keep_by_count(plan, capacity.count)
        streaming = stream_slots(capacity.count, len(plan))
        if _split_bytes(plan, sizes, keep, streaming) > capacity.size_bytes:
            keep = _keep_by_bytes(plan, sizes, capacity)
        self.keep = keep


def _keep_by_count(plan: Plan, count: int) -> frozenset[int]:
    total = len(plan)
    return spread(plan.order, min(count, total) - stream_slots(count, total))


def _keep_by_bytes(plan: Plan, sizes: Sequence[int], capacity: Capacity) -> frozenset[int]:
    """The set that keeps the most bytes while what streams still has its slots.

    A weight far larger than the others would force a stream area of its size, so every set "all
    that is larger than a threshold stays" is tried, and what room is left is spread over the rest.
    """
    total = len(plan)

    def fits(keep: frozenset[int]) -> bool:
        streaming = min(STREAM_SLOTS, total - len(keep))
        return (
            len(keep) + streaming <= capacity.count
            and _split_bytes(plan, sizes, keep, streaming) <= capacity.size_bytes
        )

    best: frozenset[int] = frozenset()
    for threshold in sorted({sizes[w] for w in plan.order}, reverse=True):
        large = frozenset(w for w in plan.order if sizes[w] > threshold)
        rest = [w for w in plan.order if sizes[w] <= threshold]
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
