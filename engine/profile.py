"""``--profile``: torch's own profiler for three passes of decoding, which are enough to see a pattern."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from common.log import log

PASSES = 3


@contextmanager
def profiled(
    path: str | None, device: torch.device, token: Callable[[], None]
) -> Iterator[Callable[[], None]]:
    """``token``, or, where ``path`` names a file, a ``token`` that profiles and writes that file as
    soon as the passes are complete."""
    if path is None:
        yield token
        return
    written = False

    def write(found: profile) -> None:
        nonlocal written
        found.export_chrome_trace(path)
        written = True
        log.info("torch's profile of %d passes is in %s", PASSES, path)

    def step() -> None:
        token()
        profiler.step()

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    # The first pass is the prefill; during the second the profiler warms up.
    passes = schedule(skip_first=1, wait=0, warmup=1, active=PASSES, repeat=1)
    with profile(activities=activities, schedule=passes, on_trace_ready=write) as profiler:
        yield step
    if not written:
        log.warning("nothing was profiled: that takes an answer of at least 3 tokens")
