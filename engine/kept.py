"""The KV cache of one text after the other, and of which tokens it has the keys and values.

What a prompt has in common with the text before, from the first token on, need not be computed again. Knows
tokens, not why they are the same: a conversation goes on, or is told from its beginning with other words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from engine.cache import make_cache, past, reserve, rounded, windows_of


class Kept:
    """``begin`` a text, ``add`` its tokens as they are chosen; passes over them fill the cache.

    At any moment, in an error too: as far as both go, the cache's entries are those of the tokens noted
    here. The cache may be ahead (candidates that were not chosen) or behind (the newest token); whichever
    is shorter counts, and the rest is cut off when the next text begins.
    """

    def __init__(self) -> None:
        self._cache: DynamicCache | None = None
        self._tokens: list[int] = []
        #: How many tokens of the last prompt were there.
        self.found = 0

    def known(self, prompt: Sequence[int]) -> int:
        """How many tokens at the beginning of ``prompt`` it has the keys and values of. Never all of them:
        what follows the last one has to be computed."""
        if self._cache is None:
            return 0
        filled = min(layer.get_seq_length() for layer in past(self._cache))
        most = min(filled, len(self._tokens), len(prompt) - 1)
        pairs = zip(self._tokens[:most], prompt, strict=False)
        return next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), most)

    @property
    def capacity(self) -> int:
        """For how many tokens it has memory, which the next prompt may use."""
        layers = past(self._cache) if self._cache else []
        return layers[0].capacity if layers and layers[0].memory is not None else 0

    def begin(self, config: Any, prompt: list[int], reuse: bool) -> DynamicCache:
        """The cache for a text that begins with ``prompt``, by a transformers config. Empty, or with
        ``reuse`` filled as far as it is `known`. Its memory, once taken, is kept: a graph that writes to
        it serves again."""
        known = self.known(prompt) if reuse else 0
        self._tokens = prompt[:known]  # first of all: these stay right, whatever goes wrong now
        if self._cache is None:
            self._cache = make_cache(
                config.num_hidden_layers,
                len(prompt) + 1,
                config.max_position_embeddings,
                windows_of(config),
            )
        cache = self._cache
        if not (known and _cut(cache, known, len(prompt) + 1)):
            known = 0
            _empty(cache, len(prompt) + 1)
        self._tokens, self.found = list(prompt), known
        return cache

    def add(self, token: int) -> None:
        """The text goes on with ``token``."""
        self._tokens.append(token)


def _cut(cache: DynamicCache, length: int, tokens: int) -> bool:
    """Leave so many tokens in it, with room for ``tokens``. False if there is no memory for both: no slot
    is given up for what can be computed again."""
    for layer in past(cache):
        layer.set_length(length)
    try:
        reserve(cache, tokens)
    except torch.OutOfMemoryError:
        return False
    return True


def _empty(cache: DynamicCache, tokens: int) -> None:
    """Leave nothing in it, and make room for ``tokens`` when they come."""
    for layer in past(cache):
        layer.reset()
        if layer.memory is None or layer.capacity < tokens:
            layer.memory, layer.capacity = None, rounded(tokens)
