"""Text that is none is a user's mistake, wherever it comes from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import UsageError
from engine.serve.errors import ApiError
from engine.serve.schema import CompletionRequest, parse
from engine.text import TokenIds, codec_for
from tests.processes import DEMO


@pytest.mark.parametrize("text", ["caf\udce9", "\ud800", "a" * 100 + "\udfff"])
def test_what_is_no_character_is_refused(text: str) -> None:
    store: Any = SimpleNamespace(path=Path(DEMO), config={})
    codec = codec_for(store)
    assert codec.decode(codec.encode("1+1=?", raw=True)) == "1+1=?"
    for ask in (
        lambda: codec.encode(text, raw=True),
        lambda: codec.encode(text, raw=False),
        lambda: codec.encode_chat([{"role": "user", "content": text}]),
    ):
        with pytest.raises(UsageError, match="no characters: give UTF-8"):
            ask()


@pytest.mark.parametrize("text", ["words", "1 -1", "160", "\u00b2", "9" * 5000, "1.0", "1_0"])
def test_token_ids_are_decimal_and_of_the_vocabulary(text: str) -> None:
    assert TokenIds(160).encode(" 1 159\n007 ", raw=False) == [1, 159, 7]
    with pytest.raises(UsageError, match="expected a prompt of token ids"):
        TokenIds(160).encode(text, raw=False)


@pytest.mark.parametrize("field", ["prompt", "stop", "user", "no\\ud800thing"])
def test_half_a_character_in_a_request(field: str) -> None:
    body = f'{{"model": "m", "prompt": "p", "{field}": "\\ud800"}}'.encode()
    with pytest.raises(ApiError, match="the body has half a character") as refused:
        parse(CompletionRequest, body)
    assert refused.value.status == 400
    whole = parse(CompletionRequest, b'{"model": "m", "prompt": "\\ud83d\\ude00"}')
    assert whole.prompt == "\U0001f600"
