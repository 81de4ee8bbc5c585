"""What a run's passes checked, and what came of them: the figures that a summary says of candidates.

Owns sums over all passes and the newest durations, so that it takes no more room the longer an engine
runs. Knows no text, and not why so many candidates were checked.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any, NamedTuple

NEWEST = 4096  # passes whose durations are kept for medians


class Pass(NamedTuple):
    """What a pass checked, and what came of it."""

    candidates: int
    accepted: int
    tokens: int  # the accepted ones and, unless the text ended there, one more
    seconds: float  # of the pass itself
    drafted: bool
    drafting_s: float


class Tally:
    """``add`` each pass after a prompt's."""

    def __init__(self) -> None:
        self._passes = self._tokens = self._drafted = 0
        self._wide = self._wide_tokens = self._candidates = self._accepted = 0
        self._wide_s = self._drafting_s = 0.0
        # Seconds of passes of one token. The first is none of them: kernels may be compiled in it.
        self._ones: deque[float] = deque(maxlen=NEWEST)
        self._met = False
        self._each: deque[tuple[float, int]] = deque(maxlen=NEWEST)  # seconds a token, tokens

    def add(self, done: Pass) -> None:
        self._passes += 1
        self._tokens += done.tokens
        self._drafting_s += done.drafting_s
        self._each.append(((done.seconds + done.drafting_s) / done.tokens, done.tokens))
        if done.candidates:
            self._wide += 1
            self._wide_tokens += done.tokens
            self._wide_s += done.seconds
            self._candidates += done.candidates
            self._accepted += done.accepted
            self._drafted += done.drafted
        elif self._met:
            self._ones.append(done.seconds)
        else:
            self._met = True

    def figures(self) -> dict[str, Any]:
        """``saved_s`` is an estimate: against passes of one token each, as they were in this run.
        Milliseconds a token are the median over tokens, those of a pass alike."""
        saved_s = 0.0
        if self._ones:
            saved_s = self._wide_tokens * median(self._ones) - self._wide_s - self._drafting_s
        each = [1000 * seconds for seconds, tokens in self._each for _ in range(tokens)]
        return {
            "passes": self._passes,
            "wide_passes": self._wide,
            "drafted_passes": self._drafted,
            "tokens_per_pass": round(self._tokens / max(1, self._passes), 3),
            "candidates": self._candidates,
            "accepted": self._accepted,
            "acceptance": round(self._accepted / max(1, self._candidates), 4),
            "drafting_s": round(self._drafting_s, 4),
            "saved_s": round(saved_s, 4),
            "ms_per_token_median": round(median(each), 3) if each else 0.0,
        }
