"""How many guessed tokens a pass should check: by how often guesses were right and what passes cost.

Pure: told of guesses and durations, knows no clock, no model and no text. What it says changes speed and
nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

#: How often a guess is right at first, by the bit length of its match: of 0, 1, 2-3, 4-7 … tokens.
BELIEVED = (0.0, 0.2, 0.35, 0.5, 0.7, 0.8, 0.85)
BELIEF = 1.0  # guesses that this is worth: not many, since to see more of them costs nothing
#: The same of a draft model's guesses, all alike. That is learned by drafting alone, so a bad draft
#: should be found out in a few.
DRAFT_BELIEVED, DRAFT_BELIEF = (0.7,), 0.15
FADE = 0.97  # of what was seen, with each guess: some thirty count
#: What one more token in a pass is taken to cost, against a pass of one, where it is not measured.
SLOPE = 0.01
DRAFT_COST = 0.05  # the same of drafting a token
FEW = 4  # tokens to draft while that is not measured
LEAST_GAIN = 1.03  # in tokens a second: less is not worth a change
SAMPLES = 9  # durations of each kind of pass
KINDS = 4  # of passes over more than one token
LONGEST_WIDE = 64  # wide passes until one of one token is measured again
FIRST_REST, LONGEST_REST = 32, 1024  # passes until what has lost is tried again

_BELIEVED_COSTS = [1.0 + SLOPE * more for more in range(1 << KINDS)]


class Choice(NamedTuple):
    """Candidates to check, and the tokens a second that this promises, against none."""

    candidates: int
    gain: float


NOTHING = Choice(0, 1.0)


class Costs:
    """What passes take, by how many tokens they are over."""

    def __init__(self) -> None:
        self._ones: deque[float] = deque(maxlen=SAMPLES)  # seconds of passes of one token
        # Tokens and seconds of passes over 2, 3-4, 5-8 and 9-16 tokens.
        self._wide_passes: list[deque[tuple[int, float]]] = [
            deque(maxlen=SAMPLES) for _ in range(KINDS)
        ]
        self._met = [False] * (1 + KINDS)
        self._wide = 0  # passes in a row

    @property
    def one_s(self) -> float | None:
        """What a pass of one token takes; None if that is not known."""
        return median(self._ones) if self._ones else None

    @property
    def known(self) -> bool:
        """Whether what a pass of one token takes has been measured, and not too long ago."""
        return bool(self._ones) and self._wide < LONGEST_WIDE

    def took(self, width: int, seconds: float) -> None:
        """A pass over ``width`` tokens took so long."""
        self._wide = self._wide + 1 if width > 1 else 0
        kind = (width - 1).bit_length()
        if not self._met[kind]:
            self._met[kind] = True  # its kernels may have been compiled: that is no measurement
        elif kind == 0:
            self._ones.append(seconds)
        else:
            self._wide_passes[kind - 1].append((width, seconds))

    def forget(self, candidates: int) -> None:
        """What was measured of passes that check so many may no longer be so."""
        self._wide_passes[candidates.bit_length() - 1].clear()

    def relative(self) -> list[float]:
        """Of passes over 1, 2, 3 … tokens, against that of a pass of one. In each kind the cost is taken
        to grow evenly from there."""
        one, costs = self.one_s or 0.0, [1.0]
        for kind, kept in enumerate(self._wide_passes, 1):
            slope = None
            if one and kept:
                slope = median((seconds - one) / (width - 1) for width, seconds in kept) / one
            for width in range((1 << kind) // 2 + 1, (1 << kind) + 1):
                believed = costs[-1] + SLOPE
                costs.append(believed if slope is None else 1.0 + max(0.0, slope) * (width - 1))
        return costs


class Pace:
    """Of one source of guesses. A source that costs nothing is listened to all the time, and teaches also
    with guesses that were not tried; one that costs (``drafts``) only when it is asked."""

    def __init__(self, costs: Costs, drafts: bool = False) -> None:
        self._costs, self._drafts = costs, drafts
        self._believe()
        self._each: deque[float] = deque(maxlen=SAMPLES)  # seconds for drafting a token
        self._met = False
        self._rest, self._next_rest, self._due = 0, FIRST_REST, False
        self._saved_s = 0.0  # since the last rest

    @property
    def resting(self) -> bool:
        """Whether it has lost, and it is too early to try again."""
        return self._rest > 0

    def choose(self, match: int, limit: int) -> Choice:
        """How many candidates to check, at most ``limit``; the first follows a match of ``match``; a
        draft's are taken to be all alike."""
        if self._rest or not self._costs.known:
            return NOTHING  # what a pass of one costs must be known
        if self._drafts and not self._each:
            limit = min(limit, FEW)
        hoped = self._best(match, limit, _BELIEVED_COSTS, DRAFT_COST)
        if not hoped.candidates and not self._drafts:
            return NOTHING
        if hoped.candidates and self._due:  # what was measured long ago may no longer be so
            self._due = False
            self._costs.forget(hoped.candidates)
            return hoped
        costs, each = self._costs.relative(), self._draft_cost()
        # Also if the end of the text is too near for it.
        if self._best(match, len(costs) - 1, costs, each).candidates:
            return self._best(match, limit, costs, each)
        self._begin_rest()
        return NOTHING

    def saw(self, match: int, right: bool) -> None:
        """A guess that followed a match of so many tokens was right, or wrong."""
        kind = self._kind(match)
        self._right[kind] = FADE * self._right[kind] + right
        self._seen[kind] = FADE * self._seen[kind] + 1

    def drafted(self, count: int, seconds: float) -> None:
        """To draft so many tokens took so long."""
        if self._met:
            self._each.append(seconds / count)
        self._met = True  # the first time a prompt was read, and kernels may have been compiled

    def passed(self) -> None:
        """A pass is over, whatever it checked."""
        if self._rest:
            self._rest -= 1
            if not self._rest and self._drafts:
                self._believe()  # nothing was learned meanwhile
                self._each.clear()

    def brought(self, tokens: int, seconds: float) -> None:
        """A pass over its candidates gave so many tokens; ``seconds``: with all that led to it."""
        self._saved_s += tokens * (self._costs.one_s or 0.0) - seconds

    def _begin_rest(self) -> None:
        if self._saved_s > 0:
            self._next_rest = FIRST_REST
        self._rest, self._due, self._saved_s = self._next_rest, True, 0.0
        self._next_rest = min(2 * self._next_rest, LONGEST_REST)

    def _believe(self) -> None:
        chances: Sequence[float] = DRAFT_BELIEVED if self._drafts else BELIEVED
        belief = DRAFT_BELIEF if self._drafts else BELIEF
        self._right = [chance * belief for chance in chances]
        self._seen = [belief] * len(chances)

    def _draft_cost(self) -> float:
        """Of a token, against a pass of one."""
        one = self._costs.one_s
        return median(self._each) / one if self._each and one else DRAFT_COST

    def _best(self, match: int, limit: int, costs: list[float], each: float) -> Choice:
        """The count of candidates that gives most tokens for the time; none if that is not enough more."""
        best, chance, expected = NOTHING, 1.0, 1.0
        for count in range(1, limit + 1):
            kind = self._kind(match + count - 1)
            chance *= self._right[kind] / self._seen[kind]
            expected += chance
            gain = expected / (costs[count] + (count * each if self._drafts else 0.0))
            if gain > max(best.gain, LEAST_GAIN):
                best = Choice(count, gain)
        return best

    def _kind(self, match: int) -> int:
        return min(match.bit_length(), len(self._right) - 1)
