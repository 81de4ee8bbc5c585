"""The requests that are understood: their fields, bounds, and what is refused by name.

What would change the answer and is not done here is refused rather than ignored. Knows no model.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from common.config import DEFAULT_BATCH
from engine.serve.errors import ApiError

Kind = TypeVar("Kind", bound=BaseModel)

#: Answers to one request: as many as share a pass, if nobody says otherwise.
MAX_CHOICES = DEFAULT_BATCH
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
#: How many of the likeliest tokens may be named at a place, as the API has it.
MAX_LOGPROBS_CHAT, MAX_LOGPROBS = 20, 5

#: Fields that are refused, unless they have one of these values, or null, which ask for nothing.
_NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "echo": (False,),
    "suffix": ("",), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "presence_penalty": (0, 0.0), "frequency_penalty": (0, 0.0), "logit_bias": ({},),
    "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (),
}  # fmt: skip

#: Fields that ask for nothing that concerns the answer.
_IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "parallel_tool_calls",
}  # fmt: skip

_Stop = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Model):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Common(_Model):
    model: str
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(_Model):
    type: Literal["text"]
    text: str


class ChatMessage(_Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(_Common):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS_CHAT)

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens are to be named at each place; None without log probabilities.
        ApiError 400 if only one of the two fields asks for them."""
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            text = f"top_logprobs {self.top_logprobs} without logprobs: give logprobs true too"
            raise ApiError(400, text, None, "top_logprobs")
        return None

    def conversation(self) -> list[dict[str, str]]:
        """The messages as chat templates take them."""
        roles = {"developer": "system"}
        return [{"role": roles.get(m.role, m.role), "content": m.text} for m in self.messages]


class CompletionRequest(_Common):
    """``POST /v1/completions``. A prompt may be token ids."""

    prompt: str | list[int]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @field_validator("logprobs", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value is False else value  # as a chat says that it wants none

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens are to be named at each place; None without log probabilities."""
        return self.logprobs


def parse(kind: type[Kind], body: bytes) -> Kind:
    """The request in a body. ApiError 400 that names the field."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is not a JSON object")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # which JSON can spell, and no tokenizer reads
        raise ApiError(400, f"the body has half a character: {error.reason}") from error
    for name, neutral in _NOT_SERVED.items():
        value = fields.pop(name, None)
        if value is not None and not any(_same(value, other) for other in neutral):
            text = f"{name} {json.dumps(value)[:80]} is not served here: leave it out"
            raise ApiError(400, text, "unsupported_parameter", name)
    for name in _IGNORED:
        fields.pop(name, None)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not _is_kind(part))
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"{place} is not known here: leave it out", None, place) from None
        raise ApiError(400, f"{place}: {first['msg']}", None, place) from None


def _is_kind(part: int | str) -> bool:
    """Whether that part of a place names no field, but which of a field's kinds was tried."""
    return isinstance(part, str) and (part in ("str", "constrained-str") or "[" in part)


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)
