"""Passes through a model, one at a time and timed: a prompt, then one greedy token a pass.

Knows nothing of how the model gets its weights, so that all that is compared is timed alike.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from common.checksum import checksum
from common.errors import ConfigError

if TYPE_CHECKING:
    from engine.steps import Steps


class Decoder:
    """One sequence with a KV cache of its own, of the kind that ``generate`` uses.

    ``context``: positions that the cache holds beforehand. They are random and not computed, which
    is all the same to the bytes that move. ConfigError if the model cannot count so far.
    """

    def __init__(
        self,
        model: Any,
        prompt_tokens: int,
        new_tokens: int,
        context: int = 0,
        step: Steps | None = None,
    ) -> None:
        """``step``: takes the tokens after the prompt, as it does in an engine."""
        from transformers import DynamicCache  # slow: a feeder that loads should not wait for it

        from engine.cache import as_argument, make_cache

        self._step = step
        self._model, self._device = model, model.device
        config = model.config
        longest, total = config.max_position_embeddings, context + prompt_tokens + new_tokens
        if total > longest:
            raise ConfigError(f"{total} tokens are more than the model's context of {longest}")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (1, prompt_tokens), generator=generator)
        self._next = ids.to(self._device)
        self._cache = (
            DynamicCache(config=config) if step is None
            else make_cache(config.num_hidden_layers, total)
        )  # fmt: skip
        self._past = as_argument(self._cache)
        if context:
            self._fill(context)
        self._tokens: list[torch.Tensor] = []

    def step(self) -> float:
        """One pass (the first: of the whole prompt), seconds to its token on the device."""
        start = time.perf_counter()
        with torch.inference_mode():
            single = self._next.shape[1] == 1 and self._cache.get_seq_length()
            if self._step is not None and self._step.useful and single:
                logits = self._step(self._next, self._cache)
            else:
                logits = self._model(
                    input_ids=self._next, use_cache=True, logits_to_keep=1, **self._past
                ).logits[:, -1]
            self._next = logits.argmax(dim=-1, keepdim=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - start
        self._tokens.append(self._next)
        return seconds

    def steps(self, count: int, limit_s: float, least: int = 2) -> list[float]:
        """Milliseconds of up to ``count`` passes; at least ``least``, and none begins after
        ``limit_s`` seconds."""
        end = time.perf_counter() + limit_s
        ms: list[float] = []
        while len(ms) < count and (len(ms) < least or time.perf_counter() < end):
            ms.append(1000 * self.step())
        return ms

    def text_checksum(self, count: int) -> str:
        """Of the first ``count`` tokens: the same for all settings if their results are."""
        ids = torch.cat(self._tokens[:count], dim=1).to("cpu", torch.int64)
        return checksum(ids.contiguous())

    def _fill(self, context: int) -> None:
        from engine.cache import head_dim

        config = self._model.config
        heads = config.num_key_value_heads
        shape = (1, heads, context, head_dim(config))
        for layer in range(config.num_hidden_layers):
            keys, values = (
                torch.randn(shape, dtype=self._model.dtype, device=self._device) for _ in range(2)
            )
            self._cache.update(keys, values, layer)


def spread(ms: list[float]) -> dict[str, Any]:
    """Median and spread of at least two times, and the times themselves."""
    deciles = statistics.quantiles(ms, n=10, method="inclusive")
    figures = {
        "median": statistics.median(ms), "min": min(ms), "p10": deciles[0], "p90": deciles[-1],
        "max": max(ms),
    }  # fmt: skip
    rounded = {name: round(value, 3) for name, value in figures.items()}
    return {**rounded, "all": [round(value, 3) for value in ms]}
