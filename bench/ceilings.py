"""What the hardware allows: link and device memory bandwidth, and how near the dequantizer comes.

On the CPU there is no link; host memory takes the device's place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from common import int4
from common.dequantize import dequantize_into
from common.memory import CudaMemory, Memory
from common.shared import SharedMemory

MIB = 1 << 20
PIECES_MIB = (1, 4, 16, 32, 64)
LINK_PIECES_MIB = (16, 32, 64)  # the sizes at which the link is at its best
SHAPES = ((27648, 5120), (5120, 27648), (5120, 5120), (1024, 5120))
_LINK_BYTES = 1 << 30
_ROUNDS = 8
_CPU_SHAPES = ((512, 192), (192, 192))
_CPU_BYTES = 64 * MIB


def ceilings(memory: Memory) -> dict[str, Any]:
    """All ceilings, in bytes a second."""
    on_gpu = isinstance(memory, CudaMemory)
    device = device_bytes_per_s(memory.device)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    dequantize = {
        f"{rows}x{columns}": _dequantize_bytes_per_s(memory.device, rows * columns, dtype)
        for rows, columns in (SHAPES if on_gpu else _CPU_SHAPES)
    }
    return {
        "link_by_piece_bytes_per_s": link_by_piece(memory, PIECES_MIB),
        "memory_bytes_per_s": device,
        "dequantize_bytes_per_s": dequantize,
        "dequantize_share": {shape: round(rate / device, 4) for shape, rate in dequantize.items()},
    }


def link(memory: Memory) -> float | None:
    """The link's bandwidth at its best, bytes a second; None where there is no link."""
    return max(link_by_piece(memory, LINK_PIECES_MIB).values(), default=None)


def link_by_piece(memory: Memory, pieces_mib: tuple[int, ...]) -> dict[str, float]:
    """Pinned host-to-device bandwidth by the size of a copy: the best of several rounds, since a
    ceiling is what can be reached. Empty where there is no link."""
    if not isinstance(memory, CudaMemory):
        return {}
    with _pinned(memory, _LINK_BYTES) as source:
        return {f"{mib} MiB": _link(memory, source, mib * MIB) for mib in pieces_mib}


@contextmanager
def _pinned(memory: Memory, size_bytes: int) -> Iterator[torch.Tensor]:
    shared = SharedMemory.create(size_bytes, "bench")
    try:
        shared.tensor.fill_(1)
        unpin = memory.pin(shared.tensor)
        try:
            yield shared.tensor
        finally:
            unpin()
    finally:
        shared.close()


def _link(memory: CudaMemory, source: torch.Tensor, piece_bytes: int) -> float:
    """Copies all of ``source`` in pieces, on one stream, into one place."""
    target = memory.allocate(piece_bytes)
    stream = torch.cuda.Stream(memory.device)
    pieces = source.numel() // piece_bytes
    rates = []
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        for piece in range(pieces):
            memory.call(
                memory.driver.cuMemcpyHtoDAsync, target.tensor.data_ptr(),
                source.data_ptr() + piece * piece_bytes, piece_bytes, stream.cuda_stream,
            )  # fmt: skip
        end.record(stream)
        end.synchronize()
        rates.append(pieces * piece_bytes / (start.elapsed_time(end) / 1000))
    target.close()
    return max(rates)


def device_bytes_per_s(device: torch.device) -> float:
    """Memory bandwidth: bytes read plus bytes written by a large copy."""
    size_bytes = 4 << 30 if device.type == "cuda" else _CPU_BYTES
    source = torch.empty(size_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size_bytes / _seconds(lambda: target.copy_(source), device)


def _dequantize_bytes_per_s(device: torch.device, elements: int, dtype: torch.dtype) -> float:
    """Bytes read plus bytes written by the dequantizer, over its time."""
    codes = torch.empty(elements // 2, dtype=torch.uint8, device=device).random_()
    scales = torch.rand(int4.scale_count(elements), device=device).to(torch.bfloat16)
    out = torch.empty(elements, dtype=dtype, device=device)
    moved = codes.numel() + 2 * scales.numel() + out.numel() * dtype.itemsize
    return moved / _seconds(lambda: dequantize_into(codes, scales, out), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median time of ``work``, with caches flushed between two runs on a GPU."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(work, rep=200, return_mode="median") / 1000
    times = []
    work()
    for _ in range(9):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
