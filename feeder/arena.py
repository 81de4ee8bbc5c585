"""Extents of one segment: who lies where. Pure arithmetic on offsets, knows no memory.

Weights that stay lie in a region of their own at the low end, so that they cannot cut up the rest,
where streamed weights are allocated next-fit: a ring of them walks round the region and frees in the
order it allocated.
"""

from __future__ import annotations

from bisect import bisect_left, insort

ALIGNMENT_BYTES = 512  # what cudaMalloc and torch's allocator give; cuBLAS picks kernels by it


def aligned(size_bytes: int) -> int:
    """``size_bytes`` rounded up to the alignment of a slot."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class Arena:
    """An allocator of extents in ``[0, size_bytes)``. Free extents are kept sorted and coalesced."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._free: list[tuple[int, int]] = [(0, size_bytes)]  # (offset, end), by offset
        self._used: dict[int, int] = {}  # offset -> end
        self._cursor = 0

    @property
    def free_bytes(self) -> int:
        return sum(end - offset for offset, end in self._free)

    def allocate(self, size_bytes: int, floor: int = 0, ceiling: int | None = None) -> int | None:
        """The offset of a new extent of ``size_bytes`` (aligned up) in ``[floor, ceiling)``, next to
        the last one if possible; None if there is no room."""
        size_bytes = aligned(size_bytes)
        ceiling = self.size_bytes if ceiling is None else ceiling
        start = bisect_left(self._free, (self._cursor, 0))
        for index in (*range(start, len(self._free)), *range(start)):
            offset, end = self._free[index]
            at = max(offset, floor)
            if at + size_bytes <= min(end, ceiling):
                return self._take(index, at, size_bytes)
        return None

    def free(self, offset: int) -> None:
        """Give back the extent that starts at ``offset``. KeyError if none does."""
        end = self._used.pop(offset)
        index = bisect_left(self._free, (offset, 0))
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index > 0 and self._free[index - 1][1] == offset:
            offset = self._free.pop(index - 1)[0]
        insort(self._free, (offset, end))

    def _take(self, index: int, at: int, size_bytes: int) -> int:
        offset, end = self._free.pop(index)
        if at > offset:
            insort(self._free, (offset, at))
        if at + size_bytes < end:
            insort(self._free, (at + size_bytes, end))
        self._used[at] = at + size_bytes
        self._cursor = at + size_bytes
        return at
