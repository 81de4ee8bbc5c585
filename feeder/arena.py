"""Extents of one segment: who lies where. Pure arithmetic on offsets, knows no memory.

Streamed weights are allocated next-fit, so that a ring of them walks round the arena and frees in the
order it allocated; weights that stay are put at the low end, so that they do not cut the ring's way.
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
        self._free: list[tuple[int, int]] = [(0, size_bytes)]  # (offset, bytes), by offset
        self._used: dict[int, int] = {}  # offset -> bytes
        self._cursor = 0

    @property
    def free_bytes(self) -> int:
        return self.size_bytes - sum(self._used.values())

    def allocate(self, size_bytes: int, low: bool = False) -> int | None:
        """The offset of a new extent of ``size_bytes`` (aligned up), or None if none is free.

        ``low``: first fit from offset 0, for what stays; otherwise next fit from the last extent.
        """
        size_bytes = aligned(size_bytes)
        start = 0 if low else bisect_left(self._free, (self._cursor, 0))
        count = len(self._free)
        for i in range(count):
            index = (start + i) % count
            offset, room = self._free[index]
            if room >= size_bytes:
                return self._take(index, size_bytes, low)
        return None

    def free(self, offset: int) -> None:
        """Give back the extent that starts at ``offset``. KeyError if none does."""
        size_bytes = self._used.pop(offset)
        index = bisect_left(self._free, (offset, 0))
        if index < len(self._free) and self._free[index][0] == offset + size_bytes:
            size_bytes += self._free.pop(index)[1]
        if index > 0 and sum(self._free[index - 1]) == offset:
            offset, before = self._free.pop(index - 1)
            size_bytes += before
        insort(self._free, (offset, size_bytes))

    def _take(self, index: int, size_bytes: int, low: bool) -> int:
        offset, room = self._free.pop(index)
        if room > size_bytes:
            insort(self._free, (offset + size_bytes, room - size_bytes))
        self._used[offset] = size_bytes
        if not low:
            self._cursor = offset + size_bytes
        return offset
