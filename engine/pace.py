"""How many guessed tokens a pass should check: by how often guesses were right and what passes cost.

Pure: told of guesses and durations, knows no clock, no model and no text. What it says changes speed and
nothing else.
"""

from __future__ import annotations

from collections import deque
from statistics import median

#: How often a guess is right at first, by the bit length of its match: of 0, 1, 2-3, 4-7 … tokens.
BELIEVED = (0.0, 0.2, 0.35, 0.5, 0.7, 0.8, 0.85)
BELIEF = 1.0  # guesses that this is worth: not many, since to see more of them costs nothing
FADE = 0.97  # of what was seen, with each guess: some thirty count
#: What one more token in a pass is taken to cost, against a pass of one, where it is not measured.
SLOPE = 0.01
LEAST_GAIN = 1.03  # in tokens a second: less is not worth a change
SAMPLES = 9  # durations of each kind of pass
KINDS = 4  # of passes over more than one token
LONGEST_WIDE = 64  # wide passes until one of one token is measured again
FIRST_REST, LONGEST_REST = 32, 1024  # passes until what has lost is tried again

_BELIEVED_COSTS = [1.0 + SLOPE * more for more in range(1 << KINDS)]


class Pace:
    """Learns from every pass, also from those that check nothing: was the guess, not tried, right?"""

    def __init__(self) -> None:
        self._right = [chance * BELIEF for chance in BELIEVED]
        self._seen = [BELIEF] * len(BELIEVED)
        self._ones: deque[float] = deque(maxlen=SAMPLES)  # seconds of passes of one token
        # Tokens and seconds of passes over 2, 3-4, 5-8 and 9-16 tokens.
        self._wide_passes: list[deque[tuple[int, float]]] = [
            deque(maxlen=SAMPLES) for _ in range(KINDS)
        ]
        self._met = [False] * (1 + KINDS)
        self._wide = 0  # passes in a row
        self._rest, self._next_rest, self._due = 0, FIRST_REST, False

    @property
    def resting(self) -> bool:
        """Whether wide passes have lost, and it is too early to try again."""
        return self._rest > 0

    @property
    def one_s(self) -> float | None:
        """What a pass of one token takes; None if that is not known."""
        return median(self._ones) if self._ones else None

    def choose(self, match: int, limit: int) -> int:
        """How many candidates to check, at most ``limit``; the first follows a match of ``match``."""
        if self._rest or not self._ones or self._wide >= LONGEST_WIDE:
            return 0  # what a pass of one costs must be known
        hoped = self._best(match, limit, _BELIEVED_COSTS)
        if not hoped:
            return 0
        if self._due:  # what was measured long ago may no longer be so
            self._due = False
            self._wide_passes[hoped.bit_length() - 1].clear()
            return hoped
        costs = self._costs()
        if self._best(
            match, len(costs) - 1, costs
        ):  # also if the end of the text is too near for it
            self._next_rest = FIRST_REST
            return self._best(match, limit, costs)
        self._rest, self._due = self._next_rest, True
        self._next_rest = min(2 * self._next_rest, LONGEST_REST)
        return 0

    def saw(self, match: int, right: bool) -> None:
        """A guess that followed a match of so many tokens was right, or wrong."""
        kind = _kind_of_match(match)
        self._right[kind] = FADE * self._right[kind] + right
        self._seen[kind] = FADE * self._seen[kind] + 1

    def took(self, width: int, seconds: float) -> None:
        """A pass over ``width`` tokens took so long."""
        self._rest = max(0, self._rest - 1)
        self._wide = self._wide + 1 if width > 1 else 0
        kind = (width - 1).bit_length()
        if not self._met[kind]:
            self._met[kind] = True  # its kernels may have been compiled: that is no measurement
        elif kind == 0:
            self._ones.append(seconds)
        else:
            self._wide_passes[kind - 1].append((width, seconds))

    def _best(self, match: int, limit: int, costs: list[float]) -> int:
        """The count of candidates that gives most tokens for the time; 0 if none gives enough more."""
        best, most, chance, expected = 0, LEAST_GAIN, 1.0, 1.0
        for count in range(1, limit + 1):
            kind = _kind_of_match(match + count - 1)
            chance *= self._right[kind] / self._seen[kind]
            expected += chance
            if expected / costs[count] > most:
                best, most = count, expected / costs[count]
        return best

    def _costs(self) -> list[float]:
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


def _kind_of_match(match: int) -> int:
    return min(match.bit_length(), len(BELIEVED) - 1)
