"""Generation: one prompt in, text out as it is made, and how long it took. transformers does the rest."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, TextStreamer, set_seed

from common.errors import UsageError
from common.log import log
from engine.loop import Loop
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
        checks = [
            ("--max-new-tokens", self.max_new_tokens, lambda v: v >= 1, "at least 1"),
            ("--temperature", self.temperature, lambda v: 0 <= v <= 100, "from 0 (greedy) to 100"),
            ("--top-p", self.top_p, lambda v: 0 < v <= 1, "above 0, at most 1"),
            ("--top-k", self.top_k, lambda v: v >= 0, "at least 0 (0: all)"),
            ("--repetition-penalty", self.repetition_penalty, lambda v: 0 < v <= 100, "above 0"),
            ("--seed", self.seed, lambda v: 0 <= v < 1 << 32, "from 0 to 2**32 - 1"),
        ]
        for flag, value, good, expected in checks:
            if value is not None and not good(value):
                raise UsageError(f"{flag} {value}: expected {expected}")

    def apply(self, config: GenerationConfig) -> GenerationConfig:
        """The model's generation config with these flags in it."""
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


@dataclass
class Answer:
    """``times_s``: the moments at which tokens were there, from the start of the prompt's pass."""

    ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    text: str = ""

    @property
    def seconds(self) -> float:
        return self.times_s[-1] if self.times_s else 0.0

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] if self.times_s else 0.0


class _Stream(TextStreamer):
    """transformers' streamer, which also notes when each token came."""

    def __init__(
        self,
        tokenizer: Any,
        answer: Answer,
        write: Callable[[str], None],
        token: Callable[[], None],
    ) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._answer, self._write, self._token = answer, write, token
        self._start = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        self._answer.ids.extend(int(token) for token in value.flatten())
        self._answer.times_s.append(time.perf_counter() - self._start)
        self._token()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


class Generator:
    """A model, its codec and the sampling: answers prompts one after the other."""

    def __init__(
        self,
        model: PreTrainedModel,
        codec: Codec,
        sampling: Sampling,
        raw: bool,
        loop: Loop,
        chunk: Callable[[int], int | None] = lambda tokens: None,
    ) -> None:
        """``chunk``: how many of a prompt's tokens one pass may take, None for all of them."""
        self._chunk, self._loop = chunk, loop
        self._model: Any = model  # its type has no ``generate``, which comes from a mixin
        self._codec, self._raw = codec, raw
        self._config = sampling.apply(model.generation_config)
        self._seed = sampling.seed

    def answer(
        self,
        prompt: str,
        write: Callable[[str], None],
        token: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Generate the answer to ``prompt``; ``write`` gets its text piece by piece, ``token`` is
        called for each token.

        UsageError if the prompt is empty or longer than the model's context.
        """
        ids = self._codec.encode(prompt, self._raw)
        context = int(self._model.config.max_position_embeddings)
        if not ids:
            raise UsageError("the prompt is empty: give at least one token")
        if len(ids) >= context:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, the model's context {context}: shorten it"
            )
        config = self._config
        if len(ids) + config.max_new_tokens > context:
            config = GenerationConfig.from_dict(config.to_dict())
            config.max_new_tokens = context - len(ids)
            log.debug("the context of %d leaves room for %d tokens", context, config.max_new_tokens)
        chunk = self._chunk(len(ids))
        if chunk is not None:
            config = GenerationConfig.from_dict(config.to_dict())
            config.prefill_chunk_size = chunk
        if self._seed is not None:
            set_seed(self._seed)
        tokens = torch.tensor([ids], device=self._model.device)
        answer = Answer()
        stream = _Stream(self._codec.tokenizer, answer, write, token)
        self._model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=config,
            custom_generate=partial(self._loop, put=stream.put),
        )
        stream.end()
        answer.text = self._codec.decode(answer.ids)
        return answer
