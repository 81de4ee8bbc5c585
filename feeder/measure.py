"""What this machine does, measured in about a second: the link, device memory, products, the host.

Runs before there are slots, takes memory only of what is free, and gives it back. Knows no strategy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from common.blocks import code_bytes, packed_bytes, scale_count
from common.dequantize import dequantize_into
from common.errors import MemoryShortageError
from common.log import log
from common.memory import PIN_CHUNK_BYTES, CudaMemory, Memory
from feeder.host import HostStore

PIECE_BYTES = 64 << 20  # such pieces move at the link's full speed
ROUND_PIECES = 8
COPY_BYTES = 256 << 20  # large against the device's caches
PRODUCT_SIZE = {"cuda": 4096, "cpu": 256}
LAUNCHES = 300
BUDGET_S = {"cuda": 0.2, "cpu": 0.03}  # for each of the four


@dataclass(frozen=True)
class Measured:
    """``link`` and ``device``: bytes a second, of the device those read plus those written.
    ``matmul``: floating-point operations a second. ``launch_s``: host time of one small operation.
    ``dequantize``: packed bytes a second on the CPU; 0 on a GPU, where memory bounds that."""

    device_name: str
    link: float
    device: float
    matmul: float
    launch_s: float
    dequantize: float = 0.0


def measure(host: HostStore, memory: Memory, dtype: torch.dtype) -> Measured | None:
    """None, and a line that says why, if even the smallest buffers find no room."""
    try:
        if isinstance(memory, CudaMemory):
            return _on_cuda(host.tensor, memory, dtype)
        with _one_thread():
            return _on_cpu(host, dtype)
    except (MemoryShortageError, RuntimeError) as error:  # cuBLAS has errors of its own for it
        log.warning("nothing is measured: %s", str(error).partition(". ")[0])
        return None
    finally:
        if memory.device.type == "cuda":
            _give_back(memory.device)


def pieces(size_bytes: int, piece_bytes: int = PIECE_BYTES) -> list[tuple[int, int]]:
    """Offset and size of pieces of a host store, spread over it. None crosses a chunk of pinned
    memory: a copy across the border of two registrations is not a pinned one."""
    piece_bytes = min(piece_bytes, size_bytes)
    starts = [
        start
        for start in range(0, size_bytes - piece_bytes + 1, piece_bytes)
        if start // PIN_CHUNK_BYTES == (start + piece_bytes - 1) // PIN_CHUNK_BYTES
    ]
    step = max(1, len(starts) // ROUND_PIECES)
    return [(start, piece_bytes) for start in starts[::step]]


def _best(budget_s: float, run: Callable[[], float]) -> float:
    """The least of what ``run`` gives, seconds of one round: a limit is what can be reached."""
    run()  # wakes what sleeps
    end = time.perf_counter() + budget_s
    best = run()
    while time.perf_counter() < end:
        best = min(best, run())
    return best


def _launch_s(device: torch.device) -> float:
    """Host time of one small operation: how fast this host runs Python and launches kernels."""
    value = torch.zeros(1, device=device)

    def launch() -> float:
        start = time.perf_counter()
        for _ in range(LAUNCHES):
            value.add(1.0)
        seconds = time.perf_counter() - start
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return seconds / LAUNCHES

    return _best(BUDGET_S[device.type] / 4, launch)


# On CUDA --------------------------------------------------------------------------------------


def _on_cuda(store: torch.Tensor, memory: CudaMemory, dtype: torch.dtype) -> Measured:
    device = memory.device
    launch_s = _launch_s(device)
    bandwidth = _device_bandwidth(memory)
    matmul = _matmul(device, dtype)
    # The link last: who asks for its generation next asks before it has gone to sleep again.
    link = link_bandwidth(store, memory)
    return Measured(torch.cuda.get_device_name(device), link, bandwidth, matmul, launch_s)


def _timed(device: torch.device, work: Callable[[], None]) -> float:
    """Seconds that ``work`` takes on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def link_bandwidth(store: torch.Tensor, memory: CudaMemory) -> float:
    """Bytes a second that page-locked host memory reaches the device with."""
    piece_bytes = PIECE_BYTES
    while True:
        try:
            target = memory.allocate(min(piece_bytes, store.numel()))
            break
        except MemoryShortageError:
            if piece_bytes <= 1 << 20:
                raise
            piece_bytes //= 4
    todo = pieces(store.numel(), piece_bytes)
    stream = torch.cuda.Stream(memory.device)

    def copy() -> None:
        for offset, size in todo:
            memory.call(
                memory.driver.cuMemcpyHtoDAsync, target.tensor.data_ptr(),
                store.data_ptr() + offset, size, stream.cuda_stream,
            )  # fmt: skip

    try:
        with torch.cuda.stream(stream):
            seconds = _best(BUDGET_S["cuda"], lambda: _timed(memory.device, copy))
    finally:
        stream.synchronize()
        target.close()
    return sum(size for _, size in todo) / seconds


def _device_bandwidth(memory: CudaMemory) -> float:
    size = min(COPY_BYTES, memory.free_bytes() // 8)
    source = torch.zeros(max(size, 1 << 20), dtype=torch.uint8, device=memory.device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(8):
            target.copy_(source)

    seconds = _best(BUDGET_S["cuda"] / 2, lambda: _timed(memory.device, copy))
    return 8 * 2 * source.numel() / seconds


def _matmul(device: torch.device, dtype: torch.dtype) -> float:
    size = PRODUCT_SIZE["cuda"]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(8):
            torch.mm(left, right, out=out)

    seconds = _best(BUDGET_S["cuda"], lambda: _timed(device, multiply))
    return 8 * 2 * size**3 / seconds


def _give_back(device: torch.device) -> None:
    """The slots need it; and what was taken here is not what this process is said to take."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


# On the CPU -----------------------------------------------------------------------------------


@contextmanager
def _one_thread() -> Iterator[None]:
    """As the filler works; and threads that wait for each other are no measure on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _on_cpu(host: HostStore, dtype: torch.dtype) -> Measured:
    """Between store and slot there are a copy and the thread that dequantizes."""
    total = len(host.places)
    weights = range(
        0, total, max(1, total // 16)
    )  # small ones take longer for a byte: of all kinds
    sizes = [min(host.places[weight].elements, 1 << 19) for weight in weights]
    out = torch.empty(max(sizes), dtype=dtype)

    def fill() -> float:
        return _seconds(lambda: _dequantize(host, zip(weights, sizes, strict=True), out))

    def copy() -> float:
        return _seconds(out.clone)

    def multiply() -> float:
        return _seconds(lambda: torch.mm(left, right))

    size = PRODUCT_SIZE["cpu"]
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))

    budget_s = BUDGET_S["cpu"]
    copied = out.nbytes / _best(budget_s, copy)
    return Measured(
        "CPU",
        link=copied,
        device=2 * copied,
        matmul=2 * size**3 / _best(budget_s, multiply),
        launch_s=_launch_s(torch.device("cpu")),
        dequantize=sum(map(packed_bytes, sizes)) / _best(budget_s, fill),
    )


def _dequantize(host: HostStore, some: Iterable[tuple[int, int]], out: torch.Tensor) -> None:
    """The first so many elements of each weight, one after the other into the same place."""
    for weight, elements in some:
        codes = host.codes(weight)[: code_bytes(elements)]
        scales = host.scales(weight)[: scale_count(elements)]
        dequantize_into(codes, scales, out[:elements])


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
