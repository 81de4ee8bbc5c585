"""What bytes a token stands for, by the tokenizer's own decoder. A token may be part of a character."""

from __future__ import annotations

import re
from typing import Any

#: How vocabularies of bytes write them: printable ones of Latin-1 as they are, the others from here on.
_FIRST_OTHER = 256
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_SPACE = "\u0120"  # a space, as such a vocabulary writes it


class TokenBytes:
    """The bytes of a tokenizer's tokens; of a number that is none, none."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._added = {n: token.content for n, token in tokenizer.added_tokens_decoder.items()}
        self._bytes: dict[str, int] = {}
        if self._decoder is not None and self._decoder.decode([_SPACE]) == " ":
            self._bytes = _alphabet()

    def __call__(self, token: int) -> bytes:
        if token in self._added:
            return str(self._added[token]).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if self._bytes:
            return bytes(self._bytes[sign] for sign in piece if sign in self._bytes)
        if found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
            return bytes([int(found[1], 16)])
        if self._decoder is None:
            return str(piece).encode()
        # Behind another token: some decoders drop the space that a text begins with.
        return str(self._decoder.decode(["a", piece])[1:]).encode()


def _alphabet() -> dict[str, int]:
    others = [byte for byte in range(256) if byte not in set(_PRINTABLE)]
    known = {chr(byte): byte for byte in _PRINTABLE}
    return known | {chr(_FIRST_OTHER + n): byte for n, byte in enumerate(others)}
