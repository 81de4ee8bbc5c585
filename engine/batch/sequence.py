"""One request among others: its tokens, its KV cache, and how its next token is chosen.

Choosing is what transformers' own loop does, with random numbers of the request's own: so a seed gives
the same text in every company.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple, Protocol

import torch
from transformers import DynamicCache

from common.errors import WeightFeederError
from engine.batch.attention import Part
from engine.generate import Answer, Request


class Owner(Protocol):
    """Whoever wants the answer."""

    @property
    def wanted(self) -> bool:
        """False once nobody waits for it any more."""

    def request(self) -> Request:
        """What is asked, when its turn has come. UsageError if it cannot be answered."""

    def done(self, answer: Answer) -> None: ...

    def failed(self, error: WeightFeederError) -> None: ...


class Chosen(NamedTuple):
    """A token and whether it ends its text: [2]. ``measured``: for the request's logprobs, if it has any,
    on its way to the host already."""

    both: torch.Tensor
    measured: torch.Tensor | None


class Sequence:
    """The request, and how far it is."""

    def __init__(self, owner: Owner, request: Request, device: torch.device) -> None:
        self.owner, self.request = owner, request
        self.ids = list(request.ids)
        self.cache: DynamicCache | None = None
        self._chunk = 1  # how many tokens of the prompt a pass may take
        self._done = 0  # tokens whose keys and values are in the cache
        self._device = device
        self._tokens = torch.tensor([self.ids], device=device)
        seed = secrets.randbits(32) if request.seed is None else request.seed
        self._random = torch.Generator(device).manual_seed(seed)

    def begin(self, cache: DynamicCache, chunk: int) -> None:
        """It has joined; ``cache`` is empty."""
        self.cache, self._done = cache, 0
        self._chunk = min(chunk, self.request.config.prefill_chunk_size or chunk)
        if len(self.ids) == len(self.request.ids):
            self.request.begin()

    def suspend(self) -> DynamicCache:
        """It has to leave, and may join again: then its tokens so far are its prompt. Its cache is free."""
        assert self.cache is not None
        cache, self.cache = self.cache, None
        return cache

    @property
    def next_rows(self) -> int:
        """How many tokens it has in the next pass."""
        left = len(self.ids) - self._done
        return min(left, self._chunk)

    @property
    def piece(self) -> tuple[int, int]:
        """Of a prompt that takes several passes and is not through: the rows of a pass, and all."""
        left = len(self.ids) - self._done
        return (self._chunk, len(self.ids)) if left > 1 and len(self.ids) > self._chunk else (0, 0)

    def part(self) -> Part:
        """Its share of the next pass."""
        assert self.cache is not None
        end = self._done + self.next_rows
        return Part(tuple(self.ids[self._done : end]), self._done, self.cache)

    def passed(self, part: Part) -> bool:
        """The pass was made; whether its logits choose a token."""
        self._done += len(part.ids)
        return self._done == len(self.ids)

    def choose(self, logits: torch.Tensor) -> Chosen:
        """The token after the last. If memory runs out, it is as if nothing had been drawn."""
        before = self._random.get_state()
        try:
            return self._choose(logits)
        except torch.OutOfMemoryError:
            self._random.set_state(before)
            raise

    def _choose(self, logits: torch.Tensor) -> Chosen:
        scores = self.request.processor(self._tokens, logits.to(torch.float32, copy=True))
        if self.request.config.do_sample:
            chances = torch.nn.functional.softmax(scores, dim=-1)
            token = torch.multinomial(chances, num_samples=1, generator=self._random)
        else:
            token = torch.argmax(scores, dim=-1, keepdim=True)
        tokens = torch.cat([self._tokens, token], dim=1)
        ended = self.request.criteria(tokens, scores)
        logprobs = self.request.logprobs
        measured = None if logprobs is None else logprobs.measure(logits, token)
        both = torch.cat([token.view(1), ended.view(1).to(token.dtype)])
        self._tokens = tokens
        return Chosen(both, measured)

    @property
    def newest(self) -> torch.Tensor:
        """The token that was chosen last, [1, 1], read or not."""
        return self._tokens[:, -1:]

    @property
    def may_go_on(self) -> bool:
        """Whether a token may follow the newest, by their number."""
        longest = self.request.criteria.max_length
        return longest is None or self._tokens.shape[1] < longest

    def advanced(self) -> None:
        """A pass was made over the newest token but one, before it was put."""
        self._done += 1

    def put(self, token: int, measured: list[float] | None) -> None:
        """The token that was chosen. Raises Stopped if no more are wanted."""
        self.ids.append(token)
        self.request.put(token, measured)


class Read(NamedTuple):
    """What `Chosen` was on the device."""

    token: int
    ended: bool
    measured: list[float] | None


class Unread:
    """Tokens, and whether they end their texts, on their way to the host."""

    def __init__(self, found: list[Chosen]) -> None:
        """``found``: of each sequence, as `Sequence.choose` gives it."""
        on_cuda = bool(found) and found[0].both.is_cuda
        self._all = torch.empty((len(found), 2), dtype=torch.int64, pin_memory=on_cuda)
        # One by one: to stack them there would take memory, and they have been chosen already.
        for row, one in zip(self._all, found, strict=True):
            row.copy_(one.both, non_blocking=True)
        self._measured = [one.measured for one in found]
        self._event: torch.cuda.Event | None = None
        if on_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[Read]:
        """That of each; waits for them."""
        if self._event is not None:
            self._event.synchronize()
        return [
            Read(token, bool(ended), None if measured is None else measured.tolist())
            for (token, ended), measured in zip(self._all.tolist(), self._measured, strict=True)
        ]
