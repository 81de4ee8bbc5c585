"""What a chat remembers, and what of an answer is dimmed."""

from __future__ import annotations

import re
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from engine.chat.conversation import Conversation
from engine.chat.dim import Dimmed

PARTS = st.sampled_from(["<think>", "</think>", "<", "think", ">", "</", "a", "b <"])


def shown(text: str, cuts: list[int], thinking: bool) -> str:
    dimmed = Dimmed(thinking)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(places)]
    return "".join(dimmed.add(piece) for piece in pieces) + dimmed.end()


@given(st.lists(PARTS).map("".join), st.lists(st.integers(0, 999)), st.booleans())
def test_the_text_is_whole_however_it_is_cut(text: str, cuts: list[int], thinking: bool) -> None:
    found = shown(text, cuts, thinking)
    assert re.sub(r"\x1b\[\d+m", "", found) == text
    # A terminal is left as it was, and no part is dimmed twice.
    codes = re.findall(r"\x1b\[(\d+)m", found)
    assert codes == ["2", "22"] * (len(codes) // 2)


def test_thoughts_are_dimmed() -> None:
    text = "a<think>b</think>c"
    assert shown(text, [3, 10], False) == "a\x1b[2m<think>b</think>\x1b[22mc"
    assert shown("b</think>c", [2], True) == "\x1b[2mb</think>\x1b[22mc"


def test_the_oldest_is_forgotten_first() -> None:
    conversation = Conversation("be brief")
    for number in range(3):
        conversation.ask(f"q{number}")
        conversation.answer(f"a{number}")
    conversation.ask("q3")
    assert conversation.forget_oldest() and conversation.forget_oldest()
    texts = [message["content"] for message in conversation.messages]
    assert texts == ["be brief", "q2", "a2", "q3"]
    assert conversation.forget_oldest() and not conversation.forget_oldest()
    conversation.withdraw()
    assert conversation.messages == [{"role": "system", "content": "be brief"}]
