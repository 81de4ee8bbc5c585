"""Tokens to text, piece by piece, and where that text is to stop. Knows no tokenizer but its ``decode``.

A character may be several tokens, and a stop string may begin in one token and end in another: what
may still become part of either is held back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"  # what the bytes of half a character are decoded to


class Pieces:
    """The text of a growing list of tokens. The pieces, joined, are the text of them all."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._before: list[
            int
        ] = []  # told, and decoded again: a token's text may depend on the last
        self._ids: list[int] = []

    def add(self, token: int) -> str:
        """The text that is complete with this token; empty if it ends amid a character."""
        self._ids.append(token)
        text = self._text()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._before, self._ids = self._ids, []
        return text

    def end(self) -> str:
        """What was held back: no token follows."""
        text, self._ids = self._text(), []
        return text

    def _text(self) -> str:
        known = len(self._decode(self._before)) if self._before else 0
        return self._decode([*self._before, *self._ids])[known:]


class StopText:
    """Lets text through up to the first of some strings to be complete, which is left out."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What of the text so far is certain, and was not returned before. Nothing once one is found."""
        if self.found:
            return ""
        text = self._held + text
        places = [(text.find(stop), stop) for stop in self._stops]
        complete = [(at + len(stop), at) for at, stop in places if at >= 0]
        if complete:
            self.found, self._held = True, ""
            return text[: min(complete)[1]]
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back, since it might have become a stop string and did not."""
        text, self._held = self._held, ""
        return text


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``stop``."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
