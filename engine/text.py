"""Text to tokens and back: the store's own tokenizer and chat template, or bare token numbers."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import AutoTokenizer

from common.errors import StoreError, UsageError
from common.store import Store

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


class Codec(Protocol):
    """Turns prompts into token ids and ids into text. ``tokenizer``: as transformers knows it."""

    tokenizer: Any

    def encode(self, text: str, raw: bool) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class Text:
    """The tokenizer of the store. ``raw`` leaves the chat template out."""

    def __init__(self, store: Store) -> None:
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(store.path, local_files_only=True)
        except Exception as error:  # whatever a damaged tokenizer makes its library raise
            raise StoreError(
                f"the tokenizer in {store.path} cannot be loaded: {error}: quantize again"
            ) from error

    def encode(self, text: str, raw: bool) -> list[int]:
        if raw or not self.tokenizer.chat_template:
            return list(self.tokenizer(text).input_ids)
        message = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer(rendered, add_special_tokens=False).input_ids)

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class _Numbers:
    """What transformers' streamer needs of a tokenizer, for a store that has none."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(f"{int(i)} " for i in ids)


class TokenIds:
    """For stores without a tokenizer, such as random ones: a prompt is token ids in decimal."""

    def __init__(self, vocabulary: int) -> None:
        self.tokenizer: Any = _Numbers()
        self._vocabulary = vocabulary

    def encode(self, text: str, raw: bool) -> list[int]:
        words = text.split()
        if not all(word.isdigit() and int(word) < self._vocabulary for word in words):
            raise UsageError(
                "this store has no tokenizer: expected a prompt of token ids, such as '1 2 3',"
                f" each below {self._vocabulary}"
            )
        return [int(word) for word in words]

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))


def codec_for(store: Store) -> Codec:
    """The codec that the store's files allow."""
    if any((store.path / name).is_file() for name in TOKENIZER_FILES):
        return Text(store)
    return TokenIds(int(store.config["vocab_size"]))
