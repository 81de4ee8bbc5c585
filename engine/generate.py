"""Generation: one prompt in, text out as it is made, and how long it took. transformers does the rest."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList, set_seed

from common.config import check_sampling
from common.errors import UsageError
from common.log import log
from engine.logprobs import Logprobs
from engine.loop import Loop
from engine.pieces import Pieces
from engine.text import Codec

DEFAULT_NEW_TOKENS = 512


@dataclass(frozen=True)
class Sampling:
    """The sampling flags; None leaves what the model's generation config says."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    greedy: bool = False

    def __post_init__(self) -> None:
        check_sampling(vars(self))

    def apply(self, config: GenerationConfig) -> GenerationConfig:
        """``config``, the model's, with these flags in it."""
        if config.max_new_tokens is None or self.max_new_tokens is not None:
            config.max_new_tokens = self.max_new_tokens or DEFAULT_NEW_TOKENS
        config.max_length = None
        config.update(num_beams=1, num_return_sequences=1)  # one sequence, whatever the model's say
        sampled = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        asked = {name: value for name, value in sampled.items() if value is not None}
        if self.greedy or self.temperature == 0:
            config.do_sample = False
        elif asked:
            config.do_sample = True
        if config.do_sample:
            config.update(**asked)
        else:  # transformers warns of sampling values that greedy search ignores
            config.update(temperature=None, top_p=None, top_k=None)
        if self.repetition_penalty is not None:
            config.repetition_penalty = self.repetition_penalty
        return config


class Stopped(Exception):
    """For ``write`` and ``token`` to raise: the answer ends here. What there is of it counts."""


@dataclass
class Answer:
    """``times_s``: the moments at which tokens were there, from the start of the prompt's pass.
    ``ended``: the model itself has ended the text, with its token for that. ``kept``: of the prompt's
    tokens so many were in the KV cache already."""

    ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    text: str = ""
    ended: bool = False
    kept: int = 0

    @property
    def seconds(self) -> float:
        return self.times_s[-1] if self.times_s else 0.0

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] if self.times_s else 0.0


class _Stream:
    """What the loop hands its tokens to: notes when each came, and writes what text they make."""

    def __init__(
        self,
        pieces: Pieces,
        answer: Answer,
        write: Callable[[str], None],
        token: Callable[[], None],
    ) -> None:
        self._pieces, self._answer, self._write, self._token = pieces, answer, write, token
        self.begin()

    def begin(self) -> None:
        """Times count from now on."""
        self._start = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        for token in value.flatten().tolist():
            self._answer.ids.append(token)
            self._answer.times_s.append(time.perf_counter() - self._start)
            self._token()
            self._tell(self._pieces.add(token))

    def end(self) -> None:
        self._tell(self._pieces.end())

    def _tell(self, text: str) -> None:
        if text:
            self._write(text)


@dataclass(frozen=True)
class Request:
    """An answer that is to be generated: how its tokens are chosen, and where they go."""

    ids: list[int]
    config: GenerationConfig
    processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    criteria: StoppingCriteriaList
    seed: int | None
    answer: Answer
    logprobs: Logprobs | None
    _stream: _Stream
    _codec: Codec

    def begin(self) -> None:
        """The pass over the prompt begins."""
        self._stream.begin()

    def put(self, token: int, measured: list[float] | None = None) -> None:
        """The next token, and what ``logprobs`` measured of it, if that was asked for. Raises Stopped if no
        more are wanted."""
        if self.logprobs is not None and measured is not None:
            self.logprobs.told(token, measured)
        self._stream.put(torch.tensor([token]))

    def conclude(self, whole: bool) -> Answer:
        """There are no more tokens. ``whole``: not since somebody wanted none."""
        try:
            if whole:
                self._stream.end()
        except Stopped:
            pass
        _conclude(self.answer, self.config, self._codec)
        return self.answer


class Generator:
    """A model, its codec and the sampling: answers prompts one after the other."""

    def __init__(
        self,
        model: PreTrainedModel,
        codec: Codec,
        sampling: Sampling,
        raw: bool,
        loop: Loop,
        chunk: Callable[[int, int, int], int | None] = lambda tokens, capacity, known: None,
    ) -> None:
        """``sampling``: of answers that are asked for without one. ``chunk``: how many of a prompt's
        tokens one pass may take, None for all of them, if there is a KV cache for ``capacity`` tokens
        that has the first ``known``."""
        self._chunk, self._loop = chunk, loop
        self._model: Any = model  # its type has no ``generate``, which comes from a mixin
        self._codec, self._raw = codec, raw
        self._sampling = sampling
        self._original = model.generation_config.to_dict()

    @property
    def context(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        return int(self._model.config.max_position_embeddings)

    @property
    def max_new_tokens(self) -> int:
        """The most tokens of an answer that is asked for without a sampling of its own."""
        original = GenerationConfig.from_dict(self._original)
        return int(self._sampling.apply(original).max_new_tokens)

    def request(
        self,
        prompt: str | Sequence[int],
        write: Callable[[str], None],
        token: Callable[[], None] = lambda: None,
        sampling: Sampling | None = None,
        logprobs: Logprobs | None = None,
    ) -> Request:
        """As `answer`, for somebody else to generate it: what that takes. Splits no prompt."""
        ids = self._codec.encode(prompt, self._raw) if isinstance(prompt, str) else list(prompt)
        check_length(len(ids), self.context)
        sampling = sampling or self._sampling
        config = self._config(sampling, len(ids), None)
        found: dict[str, Any] = {}

        def only_prepare(model: Any, input_ids: torch.Tensor, **prepared: Any) -> torch.Tensor:
            found.update(prepared)
            return input_ids

        tokens = torch.tensor([ids], device=self._model.device)
        self._model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=config,
            custom_generate=only_prepare,
        )
        answer = Answer()
        stream = _Stream(Pieces(self._codec.decode), answer, write, token)
        return Request(
            ids, config, found["logits_processor"], found["stopping_criteria"], sampling.seed,
            answer, logprobs, stream, self._codec,
        )  # fmt: skip

    def answer(
        self,
        prompt: str | Sequence[int],
        write: Callable[[str], None],
        token: Callable[[], None] = lambda: None,
        sampling: Sampling | None = None,
        reuse: bool = False,
        logprobs: Logprobs | None = None,
    ) -> Answer:
        """Generate the answer to ``prompt``, a text or its tokens; ``write`` gets its text piece by
        piece, ``token`` is called for each token. Either may raise Stopped. ``reuse``: what the prompt has
        in common with the text before, from its first token on, is not computed again. ``logprobs`` is
        told of each token before that is written.

        UsageError if the prompt is empty or longer than the model's context.
        """
        ids = self._codec.encode(prompt, self._raw) if isinstance(prompt, str) else list(prompt)
        check_length(len(ids), self.context)
        sampling = sampling or self._sampling
        known = self._loop.known(ids) if reuse else 0
        if len(ids) >= self._loop.capacity:
            known = 0  # the cache has to grow, and what it holds is given up if it cannot
        chunk = self._chunk(len(ids), self._loop.capacity, known)
        config = self._config(sampling, len(ids), chunk)
        # Without a seed of its own, one answer would go on with the random numbers of another's.
        set_seed(secrets.randbits(32) if sampling.seed is None else sampling.seed)
        tokens = torch.tensor([ids], device=self._model.device)
        answer = Answer()
        stream = _Stream(Pieces(self._codec.decode), answer, write, token)
        loop = partial(
            self._loop,
            put=stream.put,
            seeded=sampling.seed is not None,
            reuse=reuse,
            logprobs=logprobs,
        )
        try:
            self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=config,
                custom_generate=loop,
            )
            stream.end()
        except Stopped:
            pass
        answer.kept = self._loop.reused
        _conclude(answer, config, self._codec)
        return answer

    def _config(
        self, sampling: Sampling, prompt_tokens: int, chunk: int | None
    ) -> GenerationConfig:
        config = sampling.apply(GenerationConfig.from_dict(self._original))
        # ``generate`` fills what is None in its config from the model's: that is to be the same.
        self._model.generation_config = GenerationConfig.from_dict(config.to_dict())
        room = self.context - prompt_tokens
        if config.max_new_tokens > room:
            config.max_new_tokens = room
            log.debug("the context of %d leaves room for %d tokens", self.context, room)
        config.prefill_chunk_size = chunk or config.prefill_chunk_size
        return config


def _conclude(answer: Answer, config: GenerationConfig, codec: Codec) -> None:
    answer.ended = answer.ids[-1:] != [] and answer.ids[-1] in _ends(config)
    answer.text = codec.decode(answer.ids)


def check_length(prompt_tokens: int, context: int) -> None:
    """UsageError for a prompt that cannot be answered."""
    if not prompt_tokens:
        raise UsageError("the prompt is empty: give at least one token")
    if prompt_tokens >= context:
        raise UsageError(
            f"the prompt has {prompt_tokens} tokens, the model's context {context}: shorten it"
        )


def _ends(config: GenerationConfig) -> list[int]:
    found = config.eos_token_id
    if found is None:
        return []
    return [int(token) for token in found] if isinstance(found, list) else [int(found)]
