"""The shapes of answers: whole ones and streams of chunks, for chats and for bare completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.serve.jobs import Ended, Placed
from engine.serve.spelling import Spell, chat_logprobs, completion_logprobs


@dataclass
class Choice:
    """One of the answers to a request, as far as it has come."""

    text: str = ""
    placed: list[Placed] = field(default_factory=list)
    ended: Ended | None = None


@dataclass(frozen=True)
class Shape:
    """The answers to one request, as its endpoint words them. ``spell``: tokens of log probabilities, if
    those were asked for. ``index``: which of the answers."""

    chat: bool
    model: str
    prompt_tokens: int
    spell: Spell | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The reply that is sent at once."""
        ended = [choice.ended for choice in choices if choice.ended]
        kind = "chat.completion" if self.chat else "text_completion"
        found = [self._whole(index, choice) for index, choice in enumerate(choices)]
        return {**self._head(kind), "choices": found, "usage": self._usage(ended)}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What an answer begins with in a stream."""
        return [self._chunk(index, {"role": "assistant", "content": ""})] if self.chat else []

    def piece(self, index: int, text: str, placed: Sequence[Placed]) -> dict[str, Any]:
        """The chunk that goes on with ``text``."""
        if self.chat:
            return self._chunk(index, {"content": text}, placed=placed)
        return self._chunk(index, text=text, placed=placed)

    def closing(self, index: int, reason: str) -> dict[str, Any]:
        """The chunk after the last text of an answer."""
        return self._chunk(index, {}, reason=reason)

    def usage(self, ended: Sequence[Ended]) -> dict[str, Any]:
        """The chunk that only says how many tokens there were. ``ended``: of each answer."""
        return {**self._head(self._chunk_kind), "choices": [], "usage": self._usage(ended)}

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        found = self._choice(index, choice.placed, choice.ended.reason if choice.ended else None)
        if self.chat:
            found["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
        else:
            found["text"] = choice.text
        return found

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any] | None = None,
        text: str = "",
        reason: str | None = None,
        placed: Sequence[Placed] = (),
    ) -> dict[str, Any]:
        choice = self._choice(index, placed or None, reason)
        choice |= {"delta": delta} if self.chat else {"text": text}
        return {**self._head(self._chunk_kind), "choices": [choice]}

    def _choice(
        self, index: int, placed: Sequence[Placed] | None, reason: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.spell is not None and placed is not None:
            form = chat_logprobs if self.chat else completion_logprobs
            logprobs = form(placed, self.spell)
        return {"index": index, "finish_reason": reason, "logprobs": logprobs}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _usage(self, ended: Sequence[Ended]) -> dict[str, Any]:
        """The prompt counts once: what was kept of it is what the least lucky answer found."""
        tokens = sum(one.tokens for one in ended)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
            "prompt_tokens_details": {"cached_tokens": min(one.kept for one in ended)},
        }


def server_sent(data: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
