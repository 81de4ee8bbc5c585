"""A draft model: a small one that is resident beside the streamed one, and guesses how the text goes on.

Owns its KV cache, which it keeps in step with the text: what was guessed wrong is dropped at the next
guess. Knows not how tokens are chosen, nor whether guesses pay. All its weights are lent, or none:
without them, or without memory, it has no guess, and the text goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from common.errors import PeerError
from common.footprint import PASS_STEP
from common.log import log
from common.memory import Memory
from common.shortages import shortages
from common.store import Store
from engine.cache import as_argument, make_cache, past, reserve, windows_of
from engine.client import NotLent, WeightClient
from engine.model import build_model
from engine.step import Step, supports

STEPPED = 8  # tokens that are read one by one, where a token is a single launch; more, in a pass
_NOTHING = torch.empty(0, dtype=torch.int64)

#: The token that is chosen after these ids by these logits, [1, 1], and what it was drawn from, if that
#: counts.
Choose = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Drafted:
    """Guesses, and for each the chances, [1, vocabulary], that it was drawn from."""

    tokens: list[int] = field(default_factory=list)
    chances: list[torch.Tensor | None] = field(default_factory=list)


def in_common(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """With how many tokens both texts begin. Texts are long, and this is asked for each pass."""
    shorter = min(len(ours), len(theirs))
    other = (ours[:shorter] != theirs[:shorter]).nonzero()
    return int(other[0]) if len(other) else shorter


def lent_draft(
    client: WeightClient,
    store: Store,
    memory: Memory,
    dtype: torch.dtype,
    attention: str = "auto",
    stepped: bool = True,
) -> Draft:
    """The draft that the client's feeder lends, for the model of ``store``. ``stepped``: whether it may
    take single tokens by fused kernels. PeerError if its store is another by now."""
    feeder = client.wait_for_feeder()
    own = Store.open(Path(feeder.draft))
    if own.fingerprint != feeder.draft_fingerprint:
        raise PeerError(
            f"store {own.path} is now {own.fingerprint}, the feeder loaded"
            f" {feeder.draft_fingerprint}: restart the feeder"
        )
    client.names += [f"draft {entry.name}" for entry in own.weights]
    weights = range(len(store.weights), len(store.weights) + len(own.weights))
    model = build_model(own, client, memory, dtype, attention, weights.start)
    reason = supports(model)
    if reason:
        log.debug("the draft's tokens take transformers' own forward pass: %s", reason)
    step = None if reason or not stepped else Step(model, client)
    return Draft(model, step, client, weights, int(store.config["vocab_size"]))


class Draft:
    """``propose`` is all. One stream, one thread, one text at a time."""

    def __init__(
        self,
        model: Any,
        step: Step | None,
        client: WeightClient,
        weights: range,
        vocabulary: int,
    ) -> None:
        """``step``: takes single tokens, if the model can be stepped through. ``weights``: the model's,
        as the feeder knows them. ``vocabulary``: of the model that it guesses for, to which its logits
        are cut, or padded with tokens that it never guesses."""
        self._model, self._step, self._client = model, step, client
        self._weights, self._target = weights, vocabulary
        config = model.config
        self.vocabulary, self._context = int(config.vocab_size), int(config.max_position_embeddings)
        self._cache: DynamicCache | None = None
        self._read = _NOTHING  # tokens whose keys and values the cache has, on the host
        self._lent, self._graphed = True, False
        self._too_long: int | None = None  # of how many tokens a text found no room

    @property
    def graphed(self) -> bool:
        """Whether the last token that it read was one launch."""
        return self._graphed

    def propose(self, ids: torch.Tensor, count: int, choose: Choose) -> Drafted:
        """At most ``count`` guesses at what follows ``ids``, [1, tokens], one after the other."""
        text = ids[0].cpu()
        count = min(count, self._context - len(text))
        if count < 1 or int(text.max()) >= self.vocabulary or not self._usable():
            return Drafted()
        if self._too_long is not None and len(text) >= self._too_long:
            return Drafted()
        full = False
        try:
            with shortages():
                return self._propose(ids, text, count, choose)
        except NotLent:
            self._cache, self._read = None, _NOTHING
            self._usable()
        except torch.OutOfMemoryError:
            self._cache, self._read, full = None, _NOTHING, True
        finally:
            if self._step is not None:
                self._step.rest()  # nobody holds what a dead feeder lent
        if full:  # now that no traceback holds its tensors
            self._too_long = len(text)
            if ids.is_cuda:
                torch.cuda.empty_cache()
            log.warning(
                "the draft model does not find room: texts of %d tokens or more go on without it",
                len(text),
            )
        return Drafted()

    def _usable(self) -> bool:
        """Whether its weights are there, by what has been read so far. Says so if that has changed."""
        lent = self._client.stay(self._weights)
        if lent != self._lent:
            self._lent = lent
            if lent:
                log.info("the draft model is here again")
            else:
                log.warning("the draft model is gone with its feeder: going on without it")
        return lent

    def _propose(
        self, ids: torch.Tensor, text: torch.Tensor, count: int, choose: Choose
    ) -> Drafted:
        known = min(in_common(self._read, text), len(text) - 1)  # the last one's logits are wanted
        self._read = text[:known]
        cache = self._cache_for(known, len(text) + count)
        logits = self._logits(ids[:, known:], cache)
        tokens, chances = [], []
        for number in range(count):
            token, drawn_from = choose(ids, logits)
            tokens.append(token)
            chances.append(drawn_from)
            if number + 1 < count:
                ids = torch.cat([ids, token], dim=1)
                logits = self._logits(token, cache)
        guesses = torch.cat(tokens, dim=1)[0].tolist()  # the host waits here, and only here
        self._read = torch.cat([text, text.new_tensor(guesses[:-1])])
        return Drafted(guesses, chances)

    def _logits(self, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Of what follows ``ids``, [1, some], which follow what is in the cache: [1, vocabulary]."""
        step, count = self._step, ids.shape[1]
        if step is not None and count <= STEPPED and past(cache)[0].memory is not None:
            for token in ids.split(1, dim=1):
                logits = step(token, cache)
            self._graphed = step.graphed
        else:
            if step is not None:
                step.rest()  # who holds leases must not wait for others
            for piece in ids.split(PASS_STEP, dim=1):
                named = {**as_argument(cache), "use_cache": True, "logits_to_keep": 1}
                logits = self._model(input_ids=piece, **named).logits[:, -1]
        missing = self._target - logits.shape[1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        return logits[:, : self._target]

    def _cache_for(self, known: int, tokens: int) -> DynamicCache:
        """The cache with the first ``known`` tokens of what it had, and room for ``tokens``."""
        if self._cache is None:
            config = self._model.config
            layers, windows = config.num_hidden_layers, windows_of(config)
            self._cache = make_cache(layers, tokens, self._context, windows)
        for layer in past(self._cache):
            if layer.memory is not None:
                layer.set_length(known)
        if past(self._cache)[0].memory is not None:
            reserve(self._cache, tokens)
        return self._cache
