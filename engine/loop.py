"""The decoding loop: a pass over the prompt, then token after token. transformers chooses the tokens.

Handed to ``generate`` as its ``custom_generate``, which prepares logits processors and stopping criteria
from the generation config. While the whole token is one CUDA graph the next one is launched before this
one has been read, so that the GPU does not wait for the host; when the text ends there, that launch was
for nothing. With streamed weights, where a token costs a pass over the link, nothing is launched in vain;
there a pass takes candidates for the tokens that follow along, if there are any, by the step, if there is
one, whose logits are those of single tokens to the bit. What they choose is chosen in the same way, one
after the other: a candidate that is not what is chosen, and all after it, were for nothing. So the text
does not depend on candidates; where a draft model drew them, and no seed promises more, its distribution
does not. docs/speculation.md has the argument.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

from common.shortages import shortages
from engine.acceptance import draw
from engine.cache import as_argument, past, reserve
from engine.draft import Draft, Drafted
from engine.kept import Kept
from engine.logprobs import Logprobs, to_host
from engine.speculation import Speculation
from engine.steps import Steps

Survive = Callable[[Callable[[], Any], DynamicCache], Any]


class Loop:
    """``step``: takes the tokens after the prompt, if the model can be stepped through. ``survive``: makes a
    call, again if memory ran out in it and could be had. ``speculation``: proposes candidates, if any are
    wanted. ``draft``: whom it may ask for them."""

    def __init__(
        self,
        step: Steps | None,
        survive: Survive,
        speculation: Speculation | None = None,
        draft: Draft | None = None,
    ) -> None:
        self._step, self._survive, self._speculation = step, survive, speculation
        self._draft = draft
        self._kept = Kept()

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        *,
        put: Callable[[torch.Tensor], object],
        seeded: bool = False,
        reuse: bool = False,
        logprobs: Logprobs | None = None,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """The prompt and what was generated, [1, tokens]; ``put`` gets each token, [1], on the host.
        ``seeded``: the very draws count, not their distribution alone. ``reuse``: what is `known` of the
        prompt is not computed again. ``logprobs`` is told of each token before it is put. The rest is
        what ``generate`` gives its decoding methods."""
        prompt = input_ids[0].tolist()
        cache = self._kept.begin(model.config, prompt, reuse)
        sample = generation_config.do_sample
        state = _State(input_ids, logits_processor, stopping_criteria, sample, seeded, logprobs)
        if self._speculation is not None:
            self._speculation.begin(prompt, repeatable=seeded or not sample)
        new = input_ids[:, self._kept.found :]
        logits = self._prefill(model, new, cache, generation_config.prefill_chunk_size)
        try:
            unread = self._choose(state, logits, cache)
            while True:
                ahead = None
                if self._runs_ahead and state.room > 0:
                    ahead = self._choose(state, self._next(model, state.last, cache), cache)
                if self._emit(unread, put, state):
                    if ahead is not None:
                        state.ids = state.ids[:, :-1]  # launched in vain
                    break
                candidates, chances = self._candidates(state, 0 if ahead else state.room - 1)
                if candidates:
                    unread = self._check(model, candidates, chances, state, cache, put)
                else:
                    unread = ahead or self._choose(
                        state, self._next(model, state.last, cache), cache
                    )
        finally:
            if self._step is not None:
                self._step.rest()
            if self._speculation is not None:
                self._speculation.end()
        return state.ids

    def known(self, prompt: Sequence[int]) -> int:
        """How many tokens at the beginning of ``prompt`` need not be computed with ``reuse``."""
        return self._kept.known(prompt)

    @property
    def reused(self) -> int:
        """How many tokens of the last prompt were not computed."""
        return self._kept.found

    @property
    def capacity(self) -> int:
        """For how many tokens it has memory, which the next prompt may use."""
        return self._kept.capacity

    @property
    def _runs_ahead(self) -> bool:
        """Whether the next token is launched before this one has been read."""
        if self._step is None or not self._step.graphed:
            return False
        return self._speculation is None or self._speculation.resting

    def _emit(self, unread: _Unread, put: Callable[[torch.Tensor], object], state: _State) -> bool:
        """Hand the token on; whether it is the last."""
        token, ended = unread.read()
        self._kept.add(int(token))
        if state.logprobs is not None:
            state.logprobs.told(int(token), unread.measured())
        put(token)
        if self._speculation is not None:
            self._speculation.add(int(token))
        return ended

    def _candidates(self, state: _State, limit: int) -> tuple[list[int], list[torch.Tensor | None]]:
        """Candidates, and what each was drawn from; none of the latter where that does not count."""
        if self._speculation is None:
            return [], []
        draft, found = self._draft, Drafted()

        def drafted(count: int) -> list[int]:
            nonlocal found
            assert draft is not None
            with state.draws_kept():
                found = draft.propose(state.ids, count, state.guess)
            return found.tokens

        tokens = self._speculation.propose(limit, None if draft is None else drafted)
        return tokens, found.chances or [None] * len(tokens)

    def _check(
        self,
        model: Any,
        candidates: list[int],
        chances: list[torch.Tensor | None],
        state: _State,
        cache: DynamicCache,
        put: Callable[[torch.Tensor], object],
    ) -> _Unread:
        """One pass over the newest token and the candidates. Emits those that are what is chosen; the
        choice that follows them, or ends the text, is left to be read."""
        length = cache.get_seq_length()
        ids = torch.cat([state.last, state.ids.new_tensor([candidates])], dim=1)
        logits = self._several(model, ids, cache)
        for count, candidate in enumerate(candidates):
            proposed = ids[:, count + 1 : count + 2], chances[count]
            unread = self._choose(state, logits[count], cache, *proposed)
            token, ended = unread.read()
            if ended or int(token) != candidate:
                break
            self._emit(unread, put, state)
        else:
            count = len(candidates)
            unread = self._choose(state, logits[count], cache)
        for layer in past(cache):
            layer.set_length(length + 1 + count)
        return unread

    def _choose(
        self,
        state: _State,
        logits: torch.Tensor,
        cache: DynamicCache,
        *proposed: torch.Tensor | None,
    ) -> _Unread:
        unread: _Unread = self._restfully(lambda: state.choose(logits, *proposed), cache)
        return unread

    def _restfully(self, call: Callable[[], Any], cache: DynamicCache) -> Any:
        """Make the call, again if memory ran out in it and could be had. The slots that the step holds
        are what can be given up, so it lets go of them first."""

        def attempt() -> Any:
            try:
                with shortages():
                    return call()
            except torch.OutOfMemoryError:
                if self._step is not None:
                    self._step.rest()
                raise

        return self._survive(attempt, cache)

    def _prefill(
        self, model: Any, ids: torch.Tensor, cache: DynamicCache, chunk: int | None
    ) -> torch.Tensor:
        for piece in ids.split(chunk or ids.shape[1], dim=1):
            output = model(input_ids=piece, **as_argument(cache), use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    def _next(self, model: Any, token: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        step = self._step
        if step is not None and step.useful:
            return self._stepped(lambda: step(token, cache), 1, cache)
        if step is not None:
            step.rest()
        output = model(input_ids=token, **as_argument(cache), use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    def _several(
        self, model: Any, ids: torch.Tensor, cache: DynamicCache
    ) -> Sequence[torch.Tensor]:
        """The logits, [1, vocabulary], after each of ``ids``."""
        step, count = self._step, ids.shape[1]
        if step is not None and count <= step.most:
            return self._stepped(lambda: step.several(ids, cache), count, cache)
        if step is not None:
            step.rest()  # who holds leases must not wait for others
        self._survive(lambda: reserve(cache, cache.get_seq_length() + count), cache)
        output = model(input_ids=ids, **as_argument(cache), use_cache=True, logits_to_keep=count)
        return output.logits.unbind(1)

    def _stepped(self, call: Callable[[], Any], count: int, cache: DynamicCache) -> Any:
        """Make a call of the step that takes ``count`` tokens."""
        length = cache.get_seq_length()

        def take() -> Any:
            reserve(cache, length + count)
            return call()

        return self._restfully(take, cache)


class _State:
    """The tokens so far, and how the next is chosen: as transformers' own loop does."""

    def __init__(
        self,
        ids: torch.Tensor,
        processor: Any,
        criteria: Any,
        sample: bool,
        seeded: bool,
        logprobs: Logprobs | None,
    ) -> None:
        self.ids, self.logprobs = ids, logprobs
        self._processor, self._criteria = processor, criteria
        self._sample, self._seeded = sample, seeded
        self._max_length = sys.maxsize if criteria.max_length is None else criteria.max_length

    @property
    def last(self) -> torch.Tensor:
        """The newest token, [1, 1]."""
        return self.ids[:, -1:]

    @property
    def room(self) -> int:
        """How many tokens may follow, at most."""
        return self._max_length - self.ids.shape[1]

    def choose(
        self,
        logits: torch.Tensor,
        candidate: torch.Tensor | None = None,
        believed: torch.Tensor | None = None,
    ) -> _Unread:
        """Queue the choice of the token that follows; on CUDA the host does not wait for it.
        ``candidate`` was drawn from ``believed``, if that is given. If memory runs out, it is as if
        nothing had been drawn."""
        before = self._random_state() if self._sample else None
        try:
            return self._choose(logits, candidate, believed)
        except torch.OutOfMemoryError:
            if before is not None:
                self._set_random_state(before)
            raise

    def _choose(
        self,
        logits: torch.Tensor,
        candidate: torch.Tensor | None,
        believed: torch.Tensor | None,
    ) -> _Unread:
        scores = self._processor(self.ids, logits.to(torch.float32, copy=True))
        if self._sample:
            token = draw(torch.nn.functional.softmax(scores, dim=-1), candidate, believed)
        else:
            token = torch.argmax(scores, dim=-1, keepdim=True)
        ids = torch.cat([self.ids, token], dim=1)
        measured = None if self.logprobs is None else self.logprobs.measure(logits, token)
        unread = _Unread(token, self._criteria(ids, scores), measured)
        self.ids = ids
        return unread

    def _random_state(self) -> torch.Tensor:
        device = self.ids.device
        return torch.cuda.get_rng_state(device) if self.ids.is_cuda else torch.get_rng_state()

    def _set_random_state(self, state: torch.Tensor) -> None:
        if self.ids.is_cuda:
            torch.cuda.set_rng_state(state, self.ids.device)
        else:
            torch.set_rng_state(state)

    def guess(
        self, ids: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What would be chosen after ``ids`` if ``logits``, a draft's, were right: the token, [1, 1],
        and the chances that it was drawn from. None if it would be chosen again just so: the likeliest,
        or by the same draws."""
        scores = self._processor(ids, logits.to(torch.float32, copy=True))
        if not self._sample:
            return torch.argmax(scores, dim=-1, keepdim=True), None
        chances = torch.nn.functional.softmax(scores, dim=-1)
        token = torch.multinomial(chances, num_samples=1)
        return token, None if self._seeded else chances

    @contextmanager
    def draws_kept(self) -> Iterator[None]:
        """With a seed, what is drawn in here will be drawn again: a draft that is nearly right then
        draws nearly always what the model will, and the text is that of the seed."""
        if not (self._sample and self._seeded):
            yield
            return
        devices = [self.ids.device] if self.ids.is_cuda else []
        with torch.random.fork_rng(devices):
            yield


class _Unread:
    """A token, whether it is the last, and what was measured of it, on their way to the host."""

    def __init__(
        self, token: torch.Tensor, ended: torch.Tensor, measured: torch.Tensor | None
    ) -> None:
        self._both = to_host(torch.cat([token.view(1), ended.view(1).to(torch.int64)]))
        self._measured = measured
        self._event: torch.cuda.Event | None = None
        if token.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> tuple[torch.Tensor, bool]:
        """The token, [1], and whether it is the last."""
        if self._event is not None:
            self._event.synchronize()
        return self._both[:1], bool(self._both[1])

    def measured(self) -> list[float]:
        """What `Logprobs.told` takes. To be asked for when it has been read."""
        assert self._measured is not None
        found: list[float] = self._measured.tolist()
        return found
