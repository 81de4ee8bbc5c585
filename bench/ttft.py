"""Time to the first token: one pass over a whole prompt, with the cache full when it arrives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from bench.decode import Decoder, spread
from bench.fed import Fed
from bench.record import Results
from bench.report import say
from bench.settings import Setting
from bench.sweep import Effort, attempt

REPEATS = 3


def ttft(
    fed: Fed, settings: Sequence[tuple[Setting, int]], effort: Effort, results: Results
) -> None:
    """Measure each setting with a prompt of so many tokens, and add it to ``results``."""
    for setting, prompt_tokens in settings:
        figures = attempt(fed, effort, partial(measure, fed, setting, prompt_tokens))
        results.add("ttft", ttft_fields(setting, prompt_tokens), figures)
        say("ttft", f"{setting}, {prompt_tokens} tokens", results.measurements[-1])


def ttft_fields(setting: Setting, prompt_tokens: int) -> dict[str, Any]:
    """What identifies a measurement."""
    return setting.fields() | {"prompt_tokens": prompt_tokens, "repeats": REPEATS}


def measure(fed: Fed, setting: Setting, prompt_tokens: int) -> dict[str, Any]:
    """The first prompt of this length warms up; it is given apart, since a user meets it too."""
    fed.swap(setting.strategy, setting.cache)
    fed.forget_peak()
    ms, streamed = [], []
    for _ in range(1 + REPEATS):
        decoder = Decoder(fed.model, prompt_tokens, 1, setting.context, fed.step)
        before = fed.settle()
        ms.append(1000 * decoder.step())
        after = fed.settle()
        streamed.append(after["streamed_bytes"] - before["streamed_bytes"])
    return {
        "ms_to_first_token": spread(ms[1:]),
        "ms_of_warm_up": round(ms[0], 3),
        "streamed_bytes": streamed[1:],
        "engine_peak_bytes": fed.client.peak_bytes(),
        "slots_bytes": after["arena_bytes"],
    }
