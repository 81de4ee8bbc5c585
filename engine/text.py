"""Text to tokens and back: the store's own tokenizer and chat template, or bare token numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from jinja2 import TemplateError
from transformers import AutoTokenizer

from common.errors import StoreError, UsageError
from common.store import Store
from engine.token_bytes import TokenBytes

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")

Message = dict[str, str]  # of a conversation: ``role`` and ``content``


class Codec(Protocol):
    """Turns prompts into token ids and ids into text."""

    def encode(self, text: str, raw: bool) -> list[int]: ...

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The prompt of a conversation that the model is to continue. UsageError if it has no chat
        template, or that cannot render these messages."""
        ...

    def decode(self, ids: list[int]) -> str: ...

    def token_bytes(self, token: int) -> bytes:
        """What a single token stands for, which may be a part of a character."""
        ...


class Text:
    """The tokenizer of the store. ``raw`` leaves the chat template out."""

    def __init__(self, store: Store) -> None:
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(store.path, local_files_only=True)
        except Exception as error:  # whatever a damaged tokenizer makes its library raise
            raise StoreError(
                f"the tokenizer in {store.path} cannot be loaded: {error}: quantize again"
            ) from error
        self._bytes: TokenBytes | None = None
        self.tokenizer.model_max_length = (
            1 << 62
        )  # it would warn: what counts is the model's context

    def encode(self, text: str, raw: bool) -> list[int]:
        if raw or not self.tokenizer.chat_template:
            return self._tokens(text)
        return self.encode_chat([{"role": "user", "content": text}])

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        if not self.tokenizer.chat_template:
            raise UsageError("this model has no chat template: give a bare prompt")
        try:
            rendered = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise UsageError(
                f"the model's chat template refuses these messages: {error}"
            ) from error
        return self._tokens(rendered, add_special_tokens=False)

    def _tokens(self, text: str, **how: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a byte of another encoding, or JSON's half of a pair
            raise UsageError("the text has parts that are no characters: give UTF-8") from error
        return list(self.tokenizer(text, **how).input_ids)

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def token_bytes(self, token: int) -> bytes:
        if self._bytes is None:
            self._bytes = TokenBytes(self.tokenizer)
        return self._bytes(token)


class TokenIds:
    """For stores without a tokenizer, such as random ones: a prompt is token ids in decimal."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def encode(self, text: str, raw: bool) -> list[int]:
        words = text.split()
        if not all(re.fullmatch("[0-9]{1,9}", w) and int(w) < self._vocabulary for w in words):
            raise UsageError(
                "this store has no tokenizer: expected a prompt of token ids, such as '1 2 3',"
                f" each below {self._vocabulary}"
            )
        return [int(word) for word in words]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        raise UsageError("this store has no tokenizer, and so no chat: give prompts of token ids")

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{i} " for i in ids)

    def token_bytes(self, token: int) -> bytes:
        return self.decode([token]).encode()


def codec_for(store: Store) -> Codec:
    """The codec that the store's files allow."""
    if any((store.path / name).is_file() for name in TOKENIZER_FILES):
        return Text(store)
    return TokenIds(int(store.config["vocab_size"]))
