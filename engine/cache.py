"""The KV cache: one piece of memory a layer, written in place; to transformers a DynamicCache.

What transformers' own does by concatenation (a copy of the whole past for each token) is here a view of
the part that is filled, so results are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

STEP_TOKENS = 256  # capacities are multiples of it


class PastLayer(DynamicLayer):  # type: ignore[misc]
    """``keys`` and ``values``: views [1, KV heads, length, head_dim] of memory for ``capacity`` tokens."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
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
        length = self.keys.shape[-2]
        end = length + key_states.shape[-2]
        if end > self.capacity:
            self.capacity = -(-end // STEP_TOKENS) * STEP_TOKENS
            former, self.memory = self.memory, (self._allocate(key_states), self._allocate(value_states))
            for new, old in zip(self.memory, former, strict=True):
                new[:, :, :length] = old[:, :, :length]
        for part, states in zip(self.memory, (key_states, value_states), strict=True):
            part[:, :, length:end] = states
        self.set_length(end)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget the tokens and keep the memory."""
        self.is_initialized = False

    def _allocate(self, states: torch.Tensor) -> torch.Tensor:
        batch, heads, _, dim = states.shape
        return states.new_zeros((batch, heads, self.capacity, dim))


def make_cache(layers: int, tokens: int) -> DynamicCache:
    """A cache of so many layers with room for ``tokens``; it grows if there are more."""
    cache = DynamicCache()
    capacity = -(-tokens // STEP_TOKENS) * STEP_TOKENS
    cache.layers = [PastLayer(capacity) for _ in range(layers)]
    return cache
