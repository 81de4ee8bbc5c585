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


@dataclass(frozen=True)
class Shape:
    """The answer to one request, as its endpoint words it. ``spell``: tokens of log probabilities, if those
    were asked for."""

    chat: bool
    model: str
    prompt_tokens: int
    spell: Spell | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, placed: Sequence[Placed], ended: Ended) -> dict[str, Any]:
        """The reply that is sent at once."""
        choice = self._choice(placed, ended.reason)
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [choice], "usage": self._usage(ended)}

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return [self._chunk({"role": "assistant", "content": ""})] if self.chat else []

    def piece(self, text: str, placed: Sequence[Placed]) -> dict[str, Any]:
        """The chunk that goes on with ``text``."""
        if self.chat:
            return self._chunk({"content": text}, placed=placed)
        return self._chunk(text=text, placed=placed)

    def closing(self, reason: str) -> dict[str, Any]:
        """The chunk after the last text."""
        return self._chunk({}, reason=reason)

    def usage(self, ended: Ended) -> dict[str, Any]:
        """The chunk that only says how many tokens there were."""
        return {**self._head(self._chunk_kind), "choices": [], "usage": self._usage(ended)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(
        self,
        delta: dict[str, Any] | None = None,
        text: str = "",
        reason: str | None = None,
        placed: Sequence[Placed] = (),
    ) -> dict[str, Any]:
        choice = self._choice(placed, reason)
        choice |= {"delta": delta} if self.chat else {"text": text}
        return {**self._head(self._chunk_kind), "choices": [choice]}

    def _choice(self, placed: Sequence[Placed], reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self.spell is not None:
            form = chat_logprobs if self.chat else completion_logprobs
            logprobs = form(placed, self.spell)
        return {"index": 0, "finish_reason": reason, "logprobs": logprobs}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _usage(self, ended: Ended) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": ended.tokens,
            "total_tokens": self.prompt_tokens + ended.tokens,
            "prompt_tokens_details": {"cached_tokens": ended.kept},
        }


def server_sent(data: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
