"""The table of token embeddings in host memory: a pass looks up a few rows of it, so that a GPU need
not hold it. Knows nothing of models.

The rows are read by the very kernel that reads a table on the device, through the page-locked memory's
own address there: no copy is queued and the host never waits for the ids.
"""

from __future__ import annotations

import mmap

import torch

from common.memory import Memory
from common.shared import require_host_memory


def host_table(table: torch.Tensor, dtype: torch.dtype, memory: Memory) -> torch.Tensor:
    """A copy of ``table`` in host memory, converted to ``dtype``, as a tensor of ``memory.device``.

    Looking up its rows gives what a table on the device gives, to the bit. The copy lives as long as
    the result. MemoryShortageError if the host has not that much, or may not page-lock it.
    """
    size_bytes = table.numel() * dtype.itemsize
    require_host_memory(size_bytes, "the embedding")
    # Whole pages, since page-locking takes pages; torch's own memory shares them with others.
    pages = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    host = torch.frombuffer(pages, dtype=dtype).view(table.shape)
    host.copy_(table)  # on all cores
    return memory.device_view(host)
