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
    def start(self, weight: int, destination: torch.Tensor) -> Work:
        _place[weight] = destination
        delay_s = _random.random() * LONGEST_S

        def dawdle() -> None:
            destination.fill_(torch.nan)
            time.sleep(delay_s)

        self._worker.submit(dawdle)
        return super().start(weight, destination)


class PoisonCudaFiller(CudaFiller):
    def start(self, weight: int, destination: torch.Tensor) -> Work:
        _place[weight] = destination
        destination.fill_(torch.nan)  # the filler has made its stream the current one
        torch.cuda._sleep(int(_random.random() * LONGEST_S * CYCLES_PER_S))
        return super().start(weight, destination)


class PoisonScheduler(Scheduler):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"on_evict": poison})


def poison(slot: Slot) -> None:
    global _poisoned  # noqa: PLW0603
    _place[slot.weight].fill_(torch.nan)
    _poisoned += 1


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
