"""The sweep: time a token, hits, bytes and memory for each setting, on one feeder and one engine.

A setting costs a swap, a prompt, some tokens to warm up and those that are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench import ceilings
from bench.decode import Decoder, spread
from bench.fed import Fed
from bench.guard import TookTooLong
from bench.record import Results
from bench.report import say
from bench.settings import Setting
from common.config import Cache
from common.errors import WeightFeederError
from common.plan import Plan
from common.supervise import ChildFailed
from feeder.budget import Request, slot_formats, slot_sizes
from feeder.strategies.registry import make_strategy

PROMPT_TOKENS = 16
#: The first uses up the head start that a feeder at rest has, and has kernels loaded; in the second what is
#: to be a CUDA graph is captured.
WARM_UP_TOKENS = 3
CHECKED_TOKENS = 4  # of the first, which every setting has
_UNLIMITED = 1 << 62  # bytes of device memory


@dataclass(frozen=True)
class Effort:
    """How much is measured: ``tokens`` a setting, none begun after ``time_limit_s``."""

    tokens: int
    time_limit_s: float

    @property
    def hard_limit_s(self) -> float:
        """When a setting is given up altogether: warm-up and two tokens must fit in."""
        return 30 + 5 * self.time_limit_s


def sweep(fed: Fed, settings: Sequence[Setting], effort: Effort, results: Results) -> None:
    """Measure ``settings``, of one kind of slots, and add them to ``results``, smallest slots first."""
    _measure_link(fed, results, f"before {settings[0].slots}")
    sizes = {setting: asked_bytes(fed, setting) for setting in settings}
    for setting in sorted(settings, key=lambda setting: sizes[setting]):
        asked = sizes[setting]
        figures = attempt(fed, effort, partial(measure, fed, setting, effort, asked))
        results.add("sweep", sweep_fields(setting, effort), figures)
        say("sweep", str(setting), results.measurements[-1])
    _measure_link(fed, results, f"after {settings[0].slots}")


def sweep_fields(setting: Setting, effort: Effort) -> dict[str, Any]:
    """What identifies a measurement."""
    return setting.fields() | {"tokens": effort.tokens, "prompt_tokens": PROMPT_TOKENS}


def asked_bytes(fed: Fed, setting: Setting) -> int:
    """What the slots of a setting would take on a device without bounds; 0 if that is refused."""
    store, strategy = fed.store, make_strategy(setting.strategy)
    try:
        request = Request(
            plan=Plan(tuple(range(len(store.weights)))),
            sizes=slot_sizes(store, fed.dtype, slot_formats(store, setting.slots, strategy)),
            names=[entry.name for entry in store.weights],
            cache=Cache.parse(setting.cache),
        )
        return request.capacity(strategy, _UNLIMITED)[0].size_bytes
    except WeightFeederError:
        return 0


def attempt(fed: Fed, effort: Effort, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of a setting, or why there are none; whatever happens, the next one can begin."""
    try:
        with fed.limited(effort.hard_limit_s):
            return work()
    except (TookTooLong, ChildFailed) as error:
        fed.restart()
        return {"failed": str(error)}
    except WeightFeederError as error:
        return {"failed": str(error)}
    except torch.OutOfMemoryError as error:
        return {"failed": f"the engine is out of memory: {str(error).partition('.')[0]}"}


def measure(fed: Fed, setting: Setting, effort: Effort, asked: int) -> dict[str, Any]:
    """Swap to the setting, warm up, and time tokens."""
    fed.swap(setting.strategy, setting.cache)
    fed.forget_peak()
    tokens = WARM_UP_TOKENS + effort.tokens
    decoder = Decoder(fed.model, PROMPT_TOKENS, tokens, setting.context, fed.step)
    decoder.step()
    before = fed.settle()
    for _ in range(WARM_UP_TOKENS):
        decoder.step()
    moving, stall_s, start = fed.status(), fed.client.stats.stall_s, time.perf_counter()
    ms = decoder.steps(effort.tokens, effort.time_limit_s)
    seconds, moved = time.perf_counter() - start, fed.status()
    window_s = time.perf_counter() - start
    stall_s = fed.client.stats.stall_s - stall_s
    after = fed.settle()
    passes, weights = WARM_UP_TOKENS + len(ms), len(fed.store.weights)
    streamed = (after["streamed_bytes"] - before["streamed_bytes"]) / passes
    times = spread(ms)
    engine_peak, feeder_peak = fed.client.peak_bytes(), after["peak_bytes"]
    return {
        "ms_per_token": times,
        "tok_per_s": round(1000 / times["median"], 4),
        "tokens": len(ms),
        "stopped_early": len(ms) < effort.tokens,
        "hit_rate": round(1 - (after["fills"] - before["fills"]) / (passes * weights), 6),
        "streamed_bytes_per_token": round(streamed),
        "link_bytes_per_s": round(
            (moved["streamed_bytes"] - moving["streamed_bytes"]) / window_s
        ),
        "stall_share": round(min(1.0, stall_s / seconds), 4),
        "feeder_peak_bytes": feeder_peak,
        "engine_peak_bytes": engine_peak,
        "peak_bytes": feeder_peak + engine_peak,
        "slot_count": after["slots"],
        "slots_bytes": after["arena_bytes"],
        "cut": after["arena_bytes"] < asked,
        "text_checksum": decoder.text_checksum(CHECKED_TOKENS),
    }  # fmt: skip


def _measure_link(fed: Fed, results: Results, moment: str) -> None:
    fed.settle()
    found = ceilings.link(fed.memory)
    if found is not None:
        results.link(moment, found)
