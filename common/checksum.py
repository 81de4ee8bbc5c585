"""Checksums of tensors and buffers: xxh3_128, fast enough to check a store as it loads.

It finds damage, not malice. Knows nothing of files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    import torch

Buffer = bytes | bytearray | memoryview


def as_bytes(data: torch.Tensor | Buffer) -> memoryview:
    """The bytes of a buffer, or of a CPU tensor of any dtype, in row-major order.

    No copy, unless a tensor is not contiguous. Raises ValueError for a tensor on a device.
    """
    if isinstance(data, Buffer):
        return memoryview(data).cast("B")
    import torch

    if data.device.type != "cpu":
        raise ValueError(f"found a tensor on {data.device}, expected one on the CPU")
    flat = data.detach().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def checksum(data: torch.Tensor | Buffer) -> str:
    """xxh3_128 of the bytes, as 32 hexadecimal digits; releases the GIL while it works."""
    return xxhash.xxh3_128(as_bytes(data)).hexdigest()
