"""``python -m feeder`` that makes every mistake in the use of slots visible.

Each fill first overwrites its slot with NaN and dawdles; each evicted slot is overwritten, too. So
whoever reads a slot before its fill is complete, or after it was given up, reads NaN.
"""

from __future__ import annotations

import random
import sys
import time
from typing import Any

import torch

from common.formats import PACKED
from common.log import log
from common.memory import CudaMemory, Memory
from common.slots import Slot
from common.wait import Wakeup, Work
from feeder import __main__, serve, start
from feeder.filler import CpuFiller, CudaFiller, Filler
from feeder.host import HostStore
from feeder.scheduler import Scheduler

LONGEST_S = 0.004
CYCLES_PER_S = 1.5e9  # of a GPU, roughly

_random = random.Random(1)
_place: dict[int, torch.Tensor] = {}  # where each weight was filled last
_poisoned = 0


class PoisonCpuFiller(CpuFiller):
    def start(self, weight: int, slot_format: str, destination: torch.Tensor) -> Work:
        _place[weight] = destination
        delay_s = _random.random() * LONGEST_S

        def dawdle() -> None:
            overwrite(destination)
            time.sleep(delay_s)

        self._worker.submit(dawdle)
        return super().start(weight, slot_format, destination)


class PoisonCudaFiller(CudaFiller):
    def start(self, weight: int, slot_format: str, destination: torch.Tensor) -> Work:
        _place[weight] = destination
        with torch.cuda.stream(self._copy if slot_format == PACKED else self._compute):
            overwrite(destination)
            torch.cuda._sleep(int(_random.random() * LONGEST_S * CYCLES_PER_S))
        return super().start(weight, slot_format, destination)


class PoisonScheduler(Scheduler):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"on_evict": poison})


def poison(slot: Slot) -> None:
    global _poisoned  # noqa: PLW0603
    overwrite(_place[slot.weight])
    if _place[slot.weight].is_cuda:
        torch.cuda.synchronize()  # the next fill may run on another stream
    _poisoned += 1


def overwrite(destination: torch.Tensor) -> None:
    """With NaN, also what are scales of a packed slot."""
    destination.view(torch.uint8).fill_(0xFF)


def poison_filler(host: HostStore, memory: Memory, wakeup: Wakeup) -> Filler:
    if isinstance(memory, CudaMemory):
        return PoisonCudaFiller(host, memory)
    return PoisonCpuFiller(host, wakeup)


if __name__ == "__main__":
    start.filler_for = poison_filler
    serve.Scheduler = PoisonScheduler
    code = __main__.main(sys.argv[1:])
    log.info("poisoned %d evicted slots", _poisoned)
    sys.exit(code)
