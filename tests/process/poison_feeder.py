"""``python -m feeder`` that makes every mistake in the use of slots visible.

Each fill first overwrites its slot with NaN and dawdles; each evicted slot is overwritten, too. So
whoever reads a slot before its fill is complete, or after it was given up, reads NaN.
"""

from __future__ import annotations

import random
import sys
import time

import torch

from common.log import log
from common.slots import Slot
from common.wait import Wakeup, Work
from feeder import __main__, serve, start
from feeder.filler import CpuFiller
from feeder.host import HostStore
from feeder.scheduler import Scheduler

LONGEST_S = 0.004

_random = random.Random(1)
_place: dict[int, torch.Tensor] = {}  # where each weight was filled last
_poisoned = 0


class PoisonFiller(CpuFiller):
    def start(self, weight: int, destination: torch.Tensor) -> Work:
        _place[weight] = destination
        delay_s = _random.random() * LONGEST_S

        def dawdle() -> None:
            destination.fill_(torch.nan)
            time.sleep(delay_s)

        self._worker.submit(dawdle)
        return super().start(weight, destination)


class PoisonScheduler(Scheduler):
    def _evict(self, slot: Slot) -> None:
        global _poisoned  # noqa: PLW0603
        _place[slot.weight].fill_(torch.nan)
        _poisoned += 1
        super()._evict(slot)


def poison_filler(host: HostStore, memory: object, wakeup: Wakeup) -> PoisonFiller:
    return PoisonFiller(host, wakeup)


if __name__ == "__main__":
    start.filler_for = poison_filler
    serve.Scheduler = PoisonScheduler
    code = __main__.main(sys.argv[1:])
    log.info("poisoned %d evicted slots", _poisoned)
    sys.exit(code)
