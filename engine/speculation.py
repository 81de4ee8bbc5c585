"""Candidates for the tokens that follow, and what came of them.

Owns one text's lookup and the paces. Knows no model: the loop drafts and checks candidates, and says
which tokens there really were. Whatever is proposed, the text is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from common.config import Speculate
from engine.lookup import Lookup
from engine.pace import Costs, Pace
from engine.tally import Pass, Tally

Drafting = Callable[[int], list[int]]


class _Guess:
    """Tokens that a source expects, until one of them does not come."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self._tokens: list[int] = []
        self._match = 0  # that the first of them follows

    def expect(self, tokens: list[int], match: int) -> None:
        self._tokens, self._match = list(tokens), match

    def add(self, token: int) -> None:
        if self._tokens:
            right = self._tokens.pop(0) == token
            self.pace.saw(self._match, right)
            self._match += 1
            if not right:
                self._tokens = []


class Speculation:
    """The candidates of one engine, text after text. ``begin`` and ``end`` enclose a text."""

    def __init__(
        self,
        asked: Speculate,
        streams: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.perf_counter,
        rounds: bool = False,
        most: Callable[[], int] = lambda: 1,
    ) -> None:
        """``streams``: whether weights cross the link in a pass; without that ``auto`` proposes nothing.
        ``clock``: seconds, for the cost of passes. ``rounds``: whether the model's own pass over several
        tokens rounds otherwise than passes over one; where it is made, ``auto`` leaves texts alone that are
        to be the same again. ``most``: over up to how many tokens a step takes its place now, which does for
        each what it does for one alone: exactly the same, and nothing is saved by it but the link."""
        self._asked, self._streams, self._clock = asked, streams, clock
        self._rounds, self._most, self._repeatable = rounds, most, False
        self._costs = Costs()
        self._looked_up = _Guess(Pace(self._costs))
        self._drafted = _Guess(Pace(self._costs, drafts=True))
        self._guesses = [self._looked_up]
        if asked.mode == "draft":
            self._guesses.append(self._drafted)
        self._tally = Tally()
        self._text: list[int] = []
        self._lookup = Lookup()
        self._checked: list[int] = []  # candidates of this pass, not yet contradicted
        self._pace = self._looked_up.pace  # that chose them
        self._since: float | None = None  # begin of the pass that is being made
        self._width = self._tokens = 0  # that it checks, and that came of it so far
        self._taken = 0  # of the candidates
        self._drafting_s = 0.0

    @property
    def resting(self) -> bool:
        """Whether no candidates are wanted now, so that the next token may be computed ahead."""
        return bool(self.off) or all(guess.pace.resting for guess in self._guesses)

    @property
    def off(self) -> str:
        """Why nothing is proposed now, "" if it may be."""
        auto, stepped = self._asked.mode == "auto", self._most() > 1
        if (auto or stepped) and not self._streams():
            return "all weights stay"
        if auto and self._repeatable and self._rounds and not stepped:
            return "rounding could change this text (ask with --speculate lookup)"
        return ""

    def begin(self, prompt: list[int], repeatable: bool = True) -> None:
        """``repeatable``: whether the text is one that can be had again, so that no choice in it may
        depend on rounding. What is drawn anew each time is not."""
        self._text, self._lookup = list(prompt), Lookup()
        self._repeatable = repeatable
        self._checked, self._since = [], None
        for guess in self._guesses:
            guess.expect([], 0)

    def add(self, token: int) -> None:
        """The text goes on with ``token``."""
        self._text.append(token)
        self._tokens += 1
        for guess in self._guesses:
            guess.add(token)
        if self._checked:
            if self._checked.pop(0) == token:
                self._taken += 1
            else:
                self._checked = []

    def propose(self, limit: int, draft: Drafting | None = None) -> list[int]:
        """Candidates for the next pass, at most ``limit``, which begins now. ``draft`` makes a draft
        model propose so many; it may have none to give."""
        self.end()
        self._drafting_s, candidates = 0.0, []
        if limit > 0 and not self.resting:
            most = self._most()
            limit = min(limit, self._asked.most, most - 1 if most > 1 else limit)
            candidates = self._candidates(limit, draft)
        self._checked, self._since = list(candidates), self._clock()
        self._width, self._tokens, self._taken = 1 + len(candidates), 0, 0
        return candidates

    def end(self) -> None:
        """The pass is over, if there was one."""
        since, self._since, self._checked = self._since, None, []
        for guess in self._guesses:
            guess.expect([], 0)
        if since is None or not self._tokens:
            return
        seconds = self._clock() - since
        self._costs.took(self._width, seconds)
        for guess in self._guesses:
            guess.pace.passed()
        if self._width > 1:
            self._pace.brought(self._tokens, seconds + self._drafting_s)
        drafted = self._width > 1 and self._pace is self._drafted.pace
        count, taken = self._width - 1, self._taken
        self._tally.add(Pass(count, taken, self._tokens, seconds, drafted, self._drafting_s))

    def _candidates(self, limit: int, draft: Drafting | None) -> list[int]:
        """From the source that promises more; both are learned from."""
        for token in self._text[len(self._lookup) :]:
            self._lookup.add(token)
        lookup, match = self._looked_up.pace, self._lookup.match
        choice = lookup.choose(match, limit)
        # One more is kept in mind: whether that is right tells about guesses without a check.
        guess = self._lookup.guess(choice.candidates + 1)
        self._looked_up.expect(guess, match)
        if draft is not None and self._asked.mode == "draft":
            drafts = self._drafted.pace.choose(1, limit)
            if drafts.gain > choice.gain and (drafted := self._draft(draft, drafts.candidates)):
                self._pace = self._drafted.pace
                return drafted
        self._pace = lookup
        return guess[: choice.candidates]

    def _draft(self, draft: Drafting, count: int) -> list[int]:
        start = self._clock()
        drafted = draft(count)
        self._drafting_s = self._clock() - start
        if drafted:
            self._drafted.pace.drafted(len(drafted), self._drafting_s)
            self._drafted.expect(drafted, 1)
        return drafted

    def figures(self) -> dict[str, Any]:
        """For the summary. ``speculation_resting`` is of what was asked for, not of lookup beside it."""
        return {
            "speculate": str(self._asked),
            **self._tally.figures(),
            "speculation_resting": self._guesses[-1].pace.resting,
            "speculation_off": self.off,
        }
