"""Text from tokens piece by piece, and stop strings in it, however it is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.pieces import Pieces, StopText


def decode(tokens: list[int]) -> str:
    """Tokens are bytes, as the worst of tokenizers has them."""
    return bytes(tokens).decode("utf-8", "replace")


@given(st.text())
def test_no_half_characters(text: str) -> None:
    pieces = Pieces(decode)
    told = [pieces.add(token) for token in text.encode("utf-8", "replace")]
    expected = text.encode("utf-8", "replace").decode()
    assert "".join(told) == expected and pieces.end() == ""
    assert [piece for piece in told if piece] == list(expected)  # each as soon as it is complete


@given(st.binary())
def test_bytes_that_are_no_text(data: bytes) -> None:
    pieces = Pieces(decode)
    told = "".join(pieces.add(token) for token in data) + pieces.end()
    assert told == decode(list(data))


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The rule, looked at one character after the other."""
    for end in range(1, len(text) + 1):
        begun = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begun:
            return text[: min(begun)], True
    return text, False


LETTERS = st.text("ab", min_size=1, max_size=4)


@given(st.lists(st.text("abc", max_size=5)), st.lists(LETTERS, max_size=4))
def test_stop_strings_wherever_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    stop = StopText(stops)
    told = ""
    expected, found = cut("".join(pieces), stops)
    for piece in pieces:
        told += stop.add(piece)
        assert expected.startswith(told)  # nothing is told that must be taken back
    assert (told + stop.end(), stop.found) == (expected, found)


def test_held_back_no_longer_than_needed() -> None:
    stop = StopText(["stop"])
    assert [stop.add(piece) for piece in ("as", "to", "ld", "st")] == ["a", "", "stold", ""]
    assert stop.end() == "st"
