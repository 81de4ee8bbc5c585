"""What one token of a pass owns while the fused step takes it through the layers: a lane.

A pass over several tokens has several, which share the memory between a product's programs and between
the chunks of attention. And how many tokens a pass may have. Knows no weights, and not how a lane is filled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from common.config import MOST_CANDIDATES
from engine.cache import PastLayer, head_dim, past

MOST_LANES = 1 + MOST_CANDIDATES  # tokens of one pass
TILE_TOKENS, MAX_CHUNKS = 64, 64  # of attention: more CTAs than that are not needed


@dataclass
class Lane:
    """Everything is fp32 and each tensor an allocation of its own, so that all lanes are aligned alike and
    take the same variants of the kernels."""

    hidden: torch.Tensor
    qkv: torch.Tensor
    pair: torch.Tensor  # gate and up, if they are not multiplied together
    planes: torch.Tensor
    planes_out: torch.Tensor  # of attention
    planes_inner: torch.Tensor  # of the MLP
    sums: torch.Tensor
    logits: torch.Tensor  # [1, vocabulary]
    position: torch.Tensor  # int32 [1]
    tiles: int = 1  # of a chunk of the past

    def begin(self, position: int) -> None:
        """The next token is at ``position``, which alone says in which order attention's sums are made."""
        self.position.fill_(position)
        self.tiles = tiles_at(position)


def make_lane(config: Any, device: torch.device) -> Lane:
    """For a model of this transformers config."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, head_dim(config)
    heads, kv = config.num_attention_heads, config.num_key_value_heads

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=device)

    return Lane(
        hidden=zeros(hidden),
        qkv=zeros((heads + 2 * kv) * dim),
        pair=zeros(2 * inner),
        planes=zeros(9, hidden // 8),
        planes_out=zeros(9, heads * dim // 8),
        planes_inner=zeros(9, inner // 8),
        sums=zeros(hidden // 8),
        logits=zeros(1, config.vocab_size),
        position=torch.zeros(1, dtype=torch.int32, device=device),
    )


def tiles_at(position: int) -> int:
    """Of a chunk, where so many tokens are in the cache."""
    tiles = 1
    while position >= TILE_TOKENS * tiles * MAX_CHUNKS:
        tiles *= 2
    return tiles


def room_for(count: int, cache: DynamicCache) -> tuple[int, list[PastLayer]]:
    """How many tokens are in ``cache``, and its layers. ValueError if no pass over ``count`` more can be
    made, or if they find no room."""
    length, layers = cache.get_seq_length(), past(cache)
    capacity = layers[0].capacity
    if not 1 <= count <= MOST_LANES:
        raise ValueError(f"{count} tokens: a pass takes from 1 to {MOST_LANES}")
    if length + count > capacity:
        found = "all are there" if length == capacity else f"{length} are there"
        raise ValueError(f"the cache holds {capacity} tokens, and {found}")
    return length, layers
