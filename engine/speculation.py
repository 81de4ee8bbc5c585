"""Candidates for the tokens that follow, and what came of them.

Owns one text's lookup, the pace, and the figures of a run. Knows no model: the loop checks candidates, and
says which tokens there really were. Whatever is proposed, the text is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

from common.config import Speculate
from engine.lookup import Lookup
from engine.pace import Pace


class Pass(NamedTuple):
    """What a pass checked, and what came of it."""

    candidates: int
    accepted: int
    tokens: int  # the accepted ones and, unless the text ended there, one more
    seconds: float


class Speculation:
    """The candidates of one engine, text after text. ``begin`` and ``end`` enclose a text."""

    def __init__(
        self,
        asked: Speculate,
        streams: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``streams``: whether weights cross the link in a pass; without that ``auto`` proposes nothing.
        ``clock``: seconds, for the cost of passes."""
        self._asked, self._streams, self._clock = asked, streams, clock
        self._pace = Pace()
        self._passes: list[Pass] = []  # after the prompt's
        self._text: list[int] = []
        self._lookup = Lookup()
        self._guess: list[int] = []  # not yet contradicted; the first follows a match of ``_match``
        self._match = 0
        self._since: float | None = None  # begin of the pass that is being made
        self._width = self._tokens = 0  # that it checks, and that came of it so far
        self._taken = 0  # of the guess

    @property
    def resting(self) -> bool:
        """Whether no candidates are wanted now, so that the next token may be computed ahead."""
        return self._pace.resting or (self._asked.mode == "auto" and not self._streams())

    def begin(self, prompt: list[int]) -> None:
        self._text, self._lookup = list(prompt), Lookup()
        self._guess, self._since = [], None

    def add(self, token: int) -> None:
        """The text goes on with ``token``."""
        self._text.append(token)
        self._tokens += 1
        if not self._guess:
            return
        right = self._guess.pop(0) == token
        self._pace.saw(self._match, right)
        self._match += 1
        if not right:
            self._guess = []
        elif self._taken < self._width - 1:
            self._taken += 1

    def propose(self, limit: int) -> list[int]:
        """Candidates for the next pass, at most ``limit``, which begins now. One more is kept in mind:
        whether that is right tells about guesses without a check."""
        self.end()
        candidates: list[int] = []
        if limit > 0 and not self.resting:
            for token in self._text[len(self._lookup) :]:
                self._lookup.add(token)
            self._match = self._lookup.match
            count = self._pace.choose(self._match, min(limit, self._asked.most))
            self._guess = self._lookup.guess(count + 1)
            candidates = self._guess[:count]
        self._since = self._clock()
        self._width, self._tokens, self._taken = 1 + len(candidates), 0, 0
        return candidates

    def end(self) -> None:
        """The pass is over, if there was one."""
        since, self._since, self._guess = self._since, None, []
        if since is None or not self._tokens:
            return
        seconds = self._clock() - since
        self._pace.took(self._width, seconds)
        self._passes.append(Pass(self._width - 1, self._taken, self._tokens, seconds))

    def figures(self) -> dict[str, Any]:
        """For the summary. ``saved_s`` is an estimate: against passes of one token each, as they were in
        this run. Milliseconds a token are the median over tokens, those of a pass alike."""
        passes = self._passes
        tokens = sum(done.tokens for done in passes)
        each = [1000 * done.seconds / done.tokens for done in passes for _ in range(done.tokens)]
        wide = [done for done in passes if done.candidates]
        ones = [done.seconds for done in passes if not done.candidates]
        saved_s = 0.0
        if ones:
            saved_s = sum(done.tokens * median(ones) - done.seconds for done in wide)
        candidates = sum(done.candidates for done in wide)
        accepted = sum(done.accepted for done in wide)
        return {
            "speculate": str(self._asked),
            "passes": len(passes),
            "wide_passes": len(wide),
            "tokens_per_pass": round(tokens / len(passes), 3) if passes else 0.0,
            "candidates": candidates,
            "accepted": accepted,
            "acceptance": round(accepted / max(1, candidates), 4),
            "saved_s": round(saved_s, 4),
            "speculation_resting": self._pace.resting,
            "ms_per_token_median": round(median(each), 3) if each else 0.0,
        }
