"""What the hardware allows: link and device memory bandwidth, and how near the dequantizer comes.

python -m bench.ceilings [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
import triton.testing

from bench.record import finish
from common import int4
from common.dequantize import dequantize_into
from common.memory import CudaMemory
from common.shared import SharedMemory

MB = 1 << 20


def link_bytes_per_s(memory: CudaMemory, piece_bytes: int, total_bytes: int = 2 << 30) -> float:
    """Pinned host-to-device bandwidth, copying ``total_bytes`` in pieces on one stream: the best of
    several rounds, since a ceiling is what can be reached."""
    shared = SharedMemory.create(total_bytes, "bench")
    shared.tensor.fill_(1)
    unpin = memory.pin(shared.tensor)
    target = memory.allocate(piece_bytes)
    stream = torch.cuda.Stream()
    rates = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        for offset in range(0, total_bytes - piece_bytes + 1, piece_bytes):
            source = shared.tensor.data_ptr() + offset
            memory.call(
                memory.driver.cuMemcpyHtoDAsync,
                target.tensor.data_ptr(), source, piece_bytes, stream.cuda_stream,
            )  # fmt: skip
        end.record(stream)
        end.synchronize()
        copied = total_bytes // piece_bytes * piece_bytes
        rates.append(copied / (start.elapsed_time(end) / 1000))
    target.close()
    unpin()
    shared.close()
    return max(rates)


def device_bytes_per_s() -> float:
    """Device memory bandwidth, bytes read plus bytes written, of a large copy."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    ms = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.numel() / (ms / 1000)


def dequantize_bytes_per_s(rows: int, columns: int, dtype: torch.dtype) -> float:
    """Bytes read plus bytes written by the dequantizer, over its time."""
    elements = rows * columns
    codes = torch.empty(elements // 2, dtype=torch.uint8, device="cuda").random_()
    scales = torch.rand(int4.scale_count(elements), device="cuda").to(torch.bfloat16)
    out = torch.empty(elements, dtype=dtype, device="cuda")
    ms = triton.testing.do_bench(
        lambda: dequantize_into(codes, scales, out), rep=200, return_mode="median"
    )
    moved = codes.numel() + 2 * scales.numel() + out.numel() * dtype.itemsize
    return moved / (ms / 1000)


def measure() -> dict[str, object]:
    """All ceilings, in bytes a second."""
    memory = CudaMemory(torch.device("cuda", torch.cuda.current_device()))
    device = device_bytes_per_s()
    shapes = ((27648, 5120), (5120, 27648), (5120, 5120), (1024, 5120))
    dequantize = {
        f"{rows}x{columns}": dequantize_bytes_per_s(rows, columns, torch.bfloat16)
        for rows, columns in shapes
    }
    return {
        "link_bytes_per_s": {
            f"{mb} MiB": link_bytes_per_s(memory, mb * MB) for mb in (1, 4, 16, 32, 64)
        },
        "device_bytes_per_s": device,
        "dequantize_bytes_per_s": dequantize,
        "dequantize_share": {shape: rate / device for shape, rate in dequantize.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", help="write the JSON there too")
    arguments = parser.parse_args()
    result = finish(measure(), arguments.output)
    print(json.dumps(result, indent=1), file=sys.stdout)
