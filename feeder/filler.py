"""Fills: brings one weight from the host store into a slot. Knows nothing of strategies or peers.

On CUDA everything is queued and nothing waits: tiles are copied on one stream into a ring of staging
buffers and dequantized on another, so that the link never idles between two fills.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from common.memory import CudaMemory, Memory
from common.wait import Wakeup, Work, Worker
from feeder.dequantize import dequantize_into
from feeder.host import HostStore, Tile
from feeder.recorder import SILENT, Recorder

STAGING_TILES = 4


class Filler(ABC):
    """``streamed_bytes``: what has crossed the link so far."""

    def __init__(self, host: HostStore, recorder: Recorder = SILENT) -> None:
        self.host = host
        self.streamed_bytes = 0
        self._recorder = recorder

    @abstractmethod
    def start(self, weight: int, destination: torch.Tensor) -> Work:
        """Begin to fill ``destination`` (N x K elements, flat). Fills complete in the order they
        were started."""

    def close(self) -> None:
        """Free what the fills used. All fills must be complete."""


class CpuFiller(Filler):
    """Dequantizes on a thread, so that fills are as asynchronous as on a GPU."""

    def __init__(self, host: HostStore, wakeup: Wakeup, recorder: Recorder = SILENT) -> None:
        super().__init__(host, recorder)
        self._worker = Worker("fills", wakeup)
        # One core: the others are the engine's, whose threads wait for each other at every product.
        self._worker.submit(lambda: torch.set_num_threads(1))  # holds for the thread that calls it

    def start(self, weight: int, destination: torch.Tensor) -> Work:
        tiles = self.host.tiles[weight]
        self.streamed_bytes += sum(tile.size_bytes for tile in tiles)

        def fill() -> None:
            for tile in tiles:
                out = destination[tile.first :][: tile.elements]
                codes, scales = self.host.codes(weight, tile), self.host.scales(weight, tile)
                with self._recorder.dequantize(weight, tile.size_bytes):
                    dequantize_into(codes, scales, out)

        return self._worker.submit(fill)

    def close(self) -> None:
        self._worker.close()


class CudaFiller(Filler):
    """Copies on one stream, dequantizes on another."""

    def __init__(self, host: HostStore, memory: CudaMemory, recorder: Recorder = SILENT) -> None:
        super().__init__(host, recorder)
        self._memory = memory
        largest = max(tile.size_bytes for tiles in host.tiles for tile in tiles)
        self._stride = -(-largest // 512) * 512
        self._staging = memory.allocate(self._stride * STAGING_TILES)
        self._copy = torch.cuda.Stream(memory.device)
        self._compute = torch.cuda.Stream(memory.device)
        # For good: to enter it for every tile would cost more than the launch.
        torch.cuda.set_stream(self._compute)
        self._arrived = [torch.cuda.Event() for _ in range(STAGING_TILES)]
        self._consumed = [torch.cuda.Event() for _ in range(STAGING_TILES)]
        self._next = 0

    def start(self, weight: int, destination: torch.Tensor) -> Work:
        for tile in self.host.tiles[weight]:
            self._tile(weight, tile, destination[tile.first :][: tile.elements])
            self.streamed_bytes += tile.size_bytes
        return self._memory.mark(self._compute)

    def _tile(self, weight: int, tile: Tile, out: torch.Tensor) -> None:
        index = self._next
        self._next = (index + 1) % STAGING_TILES
        memory, driver = self._memory, self._memory.driver
        staging = self._staging.tensor[index * self._stride :][: tile.size_bytes]
        self._copy.wait_event(self._consumed[index])  # its last tile has been dequantized
        source = self.host.tensor.data_ptr() + tile.offset_bytes
        with self._recorder.copy(weight, tile.size_bytes, self._copy):
            memory.call(
                driver.cuMemcpyHtoDAsync,
                staging.data_ptr(), source, tile.size_bytes, self._copy.cuda_stream,
            )  # fmt: skip
        self._arrived[index].record(self._copy)
        self._compute.wait_event(self._arrived[index])
        codes = staging[: (tile.elements + 1) // 2]
        scales = staging[tile.scales_at :].view(torch.bfloat16)
        with self._recorder.dequantize(weight, tile.size_bytes, self._compute):
            dequantize_into(codes, scales, out)
        self._consumed[index].record(self._compute)

    def close(self) -> None:
        torch.cuda.synchronize(self._memory.device)
        self._staging.close()


def filler_for(
    host: HostStore, memory: Memory, wakeup: Wakeup, recorder: Recorder = SILENT
) -> Filler:
    """The filler that suits the memory's device. ``wakeup``: of the loop that waits for fills;
    ``recorder``: notes copies and dequantizations for a trace."""
    if isinstance(memory, CudaMemory):
        return CudaFiller(host, memory, recorder)
    return CpuFiller(host, wakeup, recorder)
