"""What is measured: each combination of strategy, cache, slots and context is one setting.

Knows nothing of how it is measured. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common.formats import DEQUANTIZED, FORMATS

SHAPE_HELP = "a random store of that shape, or demo; default: qwen2.5-32b with a GPU, else demo"
STRATEGIES = ("on-demand", "ring", "resident")
COUNTS = ("1", "2", "4", "8", "16", "32", "64", "128", "256", "-1")
SIZES = ("4GiB", "6GiB", "8GiB", "10GiB", "12GiB", "16GiB", "20GiB", "24GiB")
QUICK_COUNTS = ("1", "16", "-1")
QUICK_SIZES = ("4MiB",)

#: What slots can hold. A feeder of its own is started for each kind that is measured.
SLOTS = FORMATS


@dataclass(frozen=True)
class Setting:
    """``cache``: as --cache takes it. ``context``: tokens in the KV cache before the prompt."""

    strategy: str
    cache: str
    slots: str = DEQUANTIZED
    context: int = 0

    def __str__(self) -> str:
        text = f"{self.strategy} {self.cache}"
        text += "" if self.slots == DEQUANTIZED else f", {self.slots} slots"
        return text + (f", context {self.context}" if self.context else "")

    def fields(self) -> dict[str, Any]:
        return asdict(self)


def sweep_settings(
    strategies: Sequence[str],
    caches: Sequence[str] | None,
    slots: Sequence[str],
    contexts: Sequence[int],
    quick: bool,
) -> list[Setting]:
    """The sweep. Without ``caches`` the default ones: counts for all, sizes for those that prefetch."""
    counts, sizes = (QUICK_COUNTS, QUICK_SIZES) if quick else (COUNTS, SIZES)
    found = []
    for kind in slots:
        for strategy in strategies:
            chosen = caches or (*counts, *(() if strategy == "on-demand" else sizes))
            found += [
                Setting(strategy, cache, kind, context) for context in contexts for cache in chosen
            ]
    return found


def ttft_settings(slots: Sequence[str], quick: bool) -> list[Setting]:
    """Where the time to the first token is measured unless the flags say otherwise."""
    chosen = (("ring", "16"), ("resident", QUICK_SIZES[0] if quick else "8GiB"))
    return [Setting(strategy, cache, kind) for kind in slots for strategy, cache in chosen]
