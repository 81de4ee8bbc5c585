"""What there is besides: the same passes, timed in the same way, by other means."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from bench.decode import Decoder
from bench.guard import limited
from bench.record import Results
from bench.report import say
from bench.sweep import PROMPT_TOKENS, Effort
from common.errors import WeightFeederError
from common.memory import Memory
from common.store import Store

MOST_TOKENS = 5  # seconds each: these are slow


def offload_fields(layers: int, effort: Effort) -> dict[str, Any]:
    """What identifies a measurement of accelerate's offloading."""
    return {"baseline": "accelerate cpu_offload", "layers": layers} | _fields(effort)


def descends_fields(cache: int, effort: Effort) -> dict[str, Any]:
    """What identifies a measurement of the script that this project descends from."""
    return {"baseline": "synchronous copy", "cache": cache} | _fields(effort)


def baseline(
    fields: dict[str, Any], store: Store, memory: Memory, effort: Effort, results: Results
) -> None:
    """Measure the baseline that ``fields`` identify and add it to ``results``."""

    def steps(decoder: Decoder) -> list[float]:
        return decoder.steps(fields["tokens"], effort.time_limit_s)

    def work() -> dict[str, Any]:
        if "layers" in fields:
            from bench import offload

            return offload.measure(
                store, memory.device, fields["layers"], PROMPT_TOKENS, steps, fields["tokens"]
            )
        from bench import descends

        return descends.measure(
            store, memory, fields["cache"], PROMPT_TOKENS, steps, fields["tokens"]
        )

    results.add("baselines", fields, _attempt(work, memory.device, effort))
    say("baselines", fields["baseline"], results.measurements[-1])


def _fields(effort: Effort) -> dict[str, Any]:
    return {"tokens": min(effort.tokens, MOST_TOKENS), "prompt_tokens": PROMPT_TOKENS}


def _attempt(
    work: Callable[[], dict[str, Any]], device: torch.device, effort: Effort
) -> dict[str, Any]:
    """The figures, and the most device memory that they took; or why there are none."""
    on_gpu = device.type == "cuda"
    gc.collect()  # an engine's model may still be there
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with limited(60 + effort.hard_limit_s, lambda: None):
            figures = work()
    except WeightFeederError as error:
        return {"failed": str(error)}
    except torch.OutOfMemoryError as error:
        return {"failed": f"out of device memory: {str(error).partition('.')[0]}"}
    peak = torch.cuda.max_memory_reserved(device) if on_gpu else 0
    return figures | {"peak_bytes": peak}
