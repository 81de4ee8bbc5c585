"""Where the end of a text has been before in it: what followed there is a guess at what follows now.

A suffix automaton (Blumer et al. 1985: "The smallest automaton recognizing the subwords of a text"), which
grows with the text. Owns the text and its index; knows no models, and not whether a guess pays.
"""

from __future__ import annotations

from collections.abc import Iterable

#: Suffixes whose newest place is noted for each token, longest first. Only in a text that repeats itself
#: many times over are there more, and for those an older place serves.
NOTED = 64


class Lookup:
    """The longest end of the text that is in it twice, found while the text grows.

    A token costs O(1) amortized, for tokens of a bounded vocabulary. Two states a token at most.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._text: list[int] = []
        # The automaton, a column for each property of a state. A state stands for strings that end at
        # the same places; the longest has ``_length`` tokens, ``_link`` is the state of those that are
        # too short for it, and ``_end`` is the newest known place: so many tokens of the text up to it.
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._end = [-1], [0], [0]
        self._last = 0  # the state of the whole text
        self._place = 0
        #: How many tokens at the end of the text are elsewhere in it too, in a row.
        self.match = 0
        for token in tokens:
            self.add(token)

    def __len__(self) -> int:
        return len(self._text)

    def add(self, token: int) -> None:
        """The text goes on with ``token``."""
        self._text.append(token)
        self._last = self._extend(token)
        state = self._link[self._last]
        self.match, self._place = self._length[state], self._end[state]
        for _ in range(NOTED):
            if state <= 0:
                break
            self._end[state] = len(self._text)
            state = self._link[state]

    def guess(self, count: int) -> list[int]:
        """``count`` tokens that may follow: those after the newest earlier place of the match. Nothing
        if there is no match. A place so near that the text ends there is read on in the guess itself."""
        if not self.match:
            return []
        found = self._text[self._place : self._place + count]
        repeated = len(found)  # the period of what repeats
        while len(found) < count:
            found.append(found[-repeated])
        return found

    def _extend(self, token: int) -> int:
        state, last = self._state(len(self._text), {}, 0, len(self._text)), self._last
        while last != -1 and token not in self._next[last]:
            self._next[last][token] = state
            last = self._link[last]
        if last == -1:
            return state
        found = self._next[last][token]
        if self._length[last] + 1 == self._length[found]:
            self._link[state] = found
            return state
        # ``found`` also stands for longer strings, which have not been repeated: it is split.
        shorter = self._state(
            self._length[last] + 1, dict(self._next[found]), self._link[found], self._end[found]
        )
        while last != -1 and self._next[last].get(token) == found:
            self._next[last][token] = shorter
            last = self._link[last]
        self._link[found] = self._link[state] = shorter
        return state

    def _state(self, length: int, following: dict[int, int], link: int, end: int) -> int:
        self._next.append(following)
        self._length.append(length)
        self._link.append(link)
        self._end.append(end)
        return len(self._next) - 1
