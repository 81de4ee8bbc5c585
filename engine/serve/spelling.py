"""Log probabilities in the API's two forms: that of chats and the older one of completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engine.serve.jobs import Placed

Spell = Callable[[int], bytes]  # a token's bytes

LEAST = -9999.0  # stands for minus infinity, which JSON has not


def chat_logprobs(placed: Sequence[Placed], spell: Spell) -> dict[str, Any]:
    """``choices[].logprobs`` of a chat."""
    content = [
        _likely(logprob.token, logprob.value, spell)
        | {"top_logprobs": [_likely(token, value, spell) for token, value in logprob.top]}
        for _, logprob in placed
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(placed: Sequence[Placed], spell: Spell) -> dict[str, Any]:
    """``choices[].logprobs`` of a completion. The token that was chosen is among the likeliest even where
    it is none of them."""
    found = [logprob for _, logprob in placed]
    return {
        "tokens": [_name(spell(one.token)) for one in found],
        "token_logprobs": [_value(one.value) for one in found],
        "top_logprobs": [
            {
                _name(spell(token)): _value(value)
                for token, value in (*one.top, (one.token, one.value))
            }
            for one in found
        ],
        "text_offset": [offset for offset, _ in placed],
    }


def _likely(token: int, value: float, spell: Spell) -> dict[str, Any]:
    spelled = spell(token)
    text = spelled.decode("utf-8", errors="replace")
    return {"token": text, "logprob": _value(value), "bytes": list(spelled)}


def _name(spelled: bytes) -> str:
    """A token's text; if it has a part of a character only, its bytes, so that no two are the same."""
    try:
        return spelled.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _value(value: float) -> float:
    return max(LEAST, value)
