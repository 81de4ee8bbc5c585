"""The KV cache: one piece of memory a layer, written in place; to transformers a DynamicCache.

What transformers' own does by concatenation (a copy of the whole past for each token) is here a view of
the part that is filled, so results are the same. A layer with a sliding window sees what it would see there,
the window's part of the past; all of it stays, so that tokens can be taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

STEP_TOKENS = 256  # capacities are multiples of it

_RENAMED = any(field.name == "cache" for field in fields(CausalLMOutputWithPast))  # in 5.24
#: What transformers calls a cache that it is given or gives back.
CACHE_ARGUMENT = "cache" if _RENAMED else "past_key_values"


class PastLayer(DynamicLayer):
    """``keys`` and ``values``: views [1, KV heads, length, head_dim] of memory for ``capacity`` tokens."""

    def __init__(self, capacity: int, limit: int, window: int | None = None) -> None:
        """``limit``: tokens that there can ever be; it does not grow ahead beyond them. ``window``: how
        many a token looks back at, itself included; None for all."""
        super().__init__()
        self.is_sliding, self.sliding_window = window is not None, window
        self.capacity, self._limit = capacity, limit
        self.memory: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.memory is None:
            self.memory = self._allocate(key_states), self._allocate(value_states)
        self.set_length(0)
        self.is_initialized = True

    def set_length(self, length: int) -> None:
        """So many tokens are there."""
        assert self.memory is not None
        self.keys, self.values = (part[:, :, :length] for part in self.memory)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.memory is not None
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if end > self.capacity:
            self.grow(end)
        for part, states in zip(self.memory, (key_states, value_states), strict=True):
            part[:, :, length:end] = states
        self.set_length(end)
        first = self._first_seen(length)
        keys, values = self.memory
        return keys[:, :, first:end], values[:, :, first:end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys ``update`` will give for so many tokens more, and the position of the first."""
        length = self.get_seq_length()
        first = self._first_seen(length)
        return length + query_length - first, first

    def _first_seen(self, length: int) -> int:
        """The first position that the token at position ``length`` looks back at."""
        return 0 if self.sliding_window is None else max(0, length + 1 - self.sliding_window)

    def grow(self, tokens: int) -> None:
        """Make room for at least so many tokens; those that are there stay."""
        assert self.memory is not None
        length, former = self.get_seq_length(), self.capacity
        self.capacity = rounded(max(tokens, min(former + former // 4, self._limit)))
        try:
            grown = self._allocate(self.memory[0]), self._allocate(self.memory[1])
        except BaseException:
            self.capacity = former
            raise
        for new, old in zip(grown, self.memory, strict=True):
            new[:, :, :length] = old[:, :, :length]
        self.memory = grown
        self.set_length(length)

    def reset(self) -> None:
        """Forget the tokens and keep the memory."""
        self.is_initialized = False

    def _allocate(self, states: torch.Tensor) -> torch.Tensor:
        batch, heads, _, dim = states.shape
        return states.new_zeros((batch, heads, self.capacity, dim))


def make_cache(
    layers: int, tokens: int, limit: int = 1 << 62, windows: Sequence[int | None] = ()
) -> DynamicCache:
    """A cache of so many layers, with room for ``tokens`` at first, and never for more than ``limit``
    unless it must. ``windows``: of each layer, if any has one."""
    cache = DynamicCache()
    cache.layers = [
        PastLayer(rounded(tokens), limit, window) for window in windows or [None] * layers
    ]
    return cache


def as_argument(cache: Any) -> dict[str, Any]:
    """``cache`` for a model's forward pass, or for transformers' masks, by the name it has there."""
    return {CACHE_ARGUMENT: cache}


def windows_of(config: Any) -> list[int | None]:
    """The window of each layer, by a transformers config: what transformers' own cache would have."""
    return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]


def short_window(config: Any) -> str:
    """ "" if no layer's window is shorter than the context, so that all see all of it; else what to say."""
    longest = config.max_position_embeddings
    window = min((seen for seen in windows_of(config) if seen is not None), default=longest)
    if window >= longest:
        return ""
    return f"its window of {window} is shorter than its context of {longest}"


def reserve(cache: DynamicCache, tokens: int) -> None:
    """Make room for ``tokens`` in every layer, if there is less. Each has what it had if memory runs out
    half-way."""
    for layer in past(cache):
        if layer.capacity < tokens:
            layer.grow(tokens)


def past(cache: DynamicCache) -> list[PastLayer]:
    """The layers of a cache that `make_cache` made."""
    return [layer for layer in cache.layers if isinstance(layer, PastLayer)]


def head_dim(config: Any) -> int:
    """Elements of a head's keys and values, by a transformers config."""
    dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return dim


def rounded(tokens: int) -> int:
    """A capacity for so many tokens."""
    return -(-tokens // STEP_TOKENS) * STEP_TOKENS
