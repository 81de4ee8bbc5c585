"""The decoding loop: a pass over the prompt, then token after token. transformers chooses the tokens.

Handed to ``generate`` as its ``custom_generate``, which prepares logits processors and stopping criteria
from the generation config. While the whole token is one CUDA graph the next one is launched before this
one has been read, so that the GPU does not wait for the host; when the text ends there, that launch was
for nothing. With streamed weights, where a token costs a pass over the link, nothing is launched in vain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from engine.cache import make_cache, past, reserve, rounded
from engine.step import Step

Survive = Callable[[Callable[[], Any], DynamicCache], Any]


class Loop:
    """``step``: takes single tokens, if the model can be stepped through. ``survive``: makes a call,
    again if memory ran out in it and could be had."""

    def __init__(self, step: Step | None, survive: Survive) -> None:
        self._step, self._survive = step, survive
        self._cache: DynamicCache | None = None

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        *,
        put: Callable[[torch.Tensor], object],
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """The prompt and what was generated, [1, tokens]; ``put`` gets each token, [1], on the host. The
        rest is what ``generate`` gives its decoding methods."""
        cache = self._cache_for(model, input_ids.shape[1] + 1)
        state = _State(input_ids, logits_processor, stopping_criteria, generation_config.do_sample)
        logits = self._prefill(model, input_ids, cache, generation_config.prefill_chunk_size)
        try:
            unread = self._choose(state, logits, cache)
            while True:
                ahead = None
                if self._step is not None and self._step.graphed and not state.full:
                    ahead = self._choose(state, self._next(model, state.last, cache), cache)
                token, ended = unread.read()
                put(token)
                if ended:
                    if ahead is not None:
                        state.ids = state.ids[:, :-1]  # launched in vain
                    break
                unread = ahead or self._choose(state, self._next(model, state.last, cache), cache)
        finally:
            if self._step is not None:
                self._step.rest()
        return state.ids

    def _cache_for(self, model: Any, tokens: int) -> DynamicCache:
        """An empty cache. Its memory, once taken, is kept: a graph that writes to it serves again."""
        config = model.config
        cache = self._cache or make_cache(
            config.num_hidden_layers, tokens, config.max_position_embeddings
        )
        self._cache = cache
        for layer in past(cache):
            layer.reset()
            if layer.memory is None or layer.capacity < tokens:
                layer.memory, layer.capacity = None, rounded(tokens)
        self._survive(lambda: reserve(cache, tokens), cache)
        return cache

    @property
    def kept_tokens(self) -> int:
        """For how many tokens it has memory, which the next prompt may use."""
        layers = past(self._cache) if self._cache else []
        return layers[0].capacity if layers and layers[0].memory is not None else 0

    def _choose(self, state: _State, logits: torch.Tensor, cache: DynamicCache) -> _Unread:
        def attempt() -> _Unread:
            try:
                return state.choose(logits)
            except torch.OutOfMemoryError:
                if self._step is not None:
                    self._step.rest()
                raise

        unread: _Unread = self._survive(attempt, cache)
        return unread

    def _prefill(
        self, model: Any, ids: torch.Tensor, cache: DynamicCache, chunk: int | None
    ) -> torch.Tensor:
        for piece in ids.split(chunk or ids.shape[1], dim=1):
            output = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    def _next(self, model: Any, token: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        if self._step is not None and not self._step.useful:
            self._step.rest()
        if self._step is None or not self._step.useful:
            output = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return output.logits[:, -1]
        step, length = self._step, cache.get_seq_length()

        def attempt() -> torch.Tensor:
            try:
                reserve(cache, length + 1)
                return step(token, cache)
            except torch.OutOfMemoryError:
                step.rest()  # the slots that it holds are what can be given up
                raise

        logits: torch.Tensor = self._survive(attempt, cache)
        return logits


class _State:
    """The tokens so far, and how the next is chosen: as transformers' own loop does."""

    def __init__(self, ids: torch.Tensor, processor: Any, criteria: Any, sample: bool) -> None:
        self.ids = ids
        self._processor, self._criteria, self._sample = processor, criteria, sample
        self._max_length = criteria.max_length

    @property
    def last(self) -> torch.Tensor:
        """The newest token, [1, 1]."""
        return self.ids[:, -1:]

    @property
    def full(self) -> bool:
        """Whether no token may follow."""
        return self._max_length is not None and self.ids.shape[1] >= self._max_length

    def choose(self, logits: torch.Tensor) -> _Unread:
        """Queue the choice of the token that follows; on CUDA the host does not wait for it."""
        scores = self._processor(self.ids, logits.to(torch.float32, copy=True))
        if self._sample:
            chances = torch.nn.functional.softmax(scores, dim=-1)
            token = torch.multinomial(chances, num_samples=1)
        else:
            token = torch.argmax(scores, dim=-1, keepdim=True)
        ids = torch.cat([self.ids, token], dim=1)
        unread = _Unread(token, self._criteria(ids, scores))
        self.ids = ids
        return unread


class _Unread:
    """A token, and whether it is the last, on their way to the host."""

    def __init__(self, token: torch.Tensor, ended: torch.Tensor) -> None:
        both = torch.cat([token.view(1), ended.view(1).to(torch.int64)])
        self._event: torch.cuda.Event | None = None
        if both.is_cuda:
            self._both = torch.empty(2, dtype=torch.int64, pin_memory=True)
            self._both.copy_(both, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._both = both

    def read(self) -> tuple[torch.Tensor, bool]:
        """The token, [1], and whether it is the last."""
        if self._event is not None:
            self._event.synchronize()
        return self._both[:1], bool(self._both[1])
