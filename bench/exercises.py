"""Texts of a known form, drawn from any prose: copies of a passage, and lists of words.

Owns how they are written and drawn: `bench.prose` trains on some, `bench.kinds` asks others. Knows
nothing of tokens, models or torch.
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

from common.errors import UsageError

PASSAGE_WORDS = (4, 16)
LISTED_WORDS = (3, 7)
MOST_DRAWS = 10_000  # for one list
#: Of the passages to train on: of random words, so that only the copy says what comes.
_CHAOTIC = 0.5
_WORD = re.compile(r"[a-z]{3,9}")


class Exercise(NamedTuple):
    """A prompt, and the answer that continues it."""

    prompt: str
    answer: str


def copying(rng: random.Random, words: list[str], chaotic: bool = False) -> Exercise:
    """A passage of ``words`` that the answer repeats; ``chaotic``: of words in no order."""
    count = rng.randint(*PASSAGE_WORDS)
    start = rng.randrange(len(words) - count)
    passage = " ".join(rng.choices(words, k=count) if chaotic else words[start : start + count])
    return Exercise(f"Text:\n{passage}\nCopy:\n", f"{passage}\n")


def listing(rng: random.Random, words: list[str]) -> Exercise:
    """Some of ``words``, of which the answer makes a numbered list."""
    count, found = rng.randint(*LISTED_WORDS), list[str]()
    for word in (rng.choice(words) for _ in range(MOST_DRAWS)):
        if len(found) == count:
            break
        if _WORD.fullmatch(word) and word not in found:
            found.append(word)
    else:
        raise UsageError("the text has too few words of 3 to 9 letters a to z: give another one")
    lines = [f'{n}. the word "{word}" of this list\n' for n, word in enumerate(found, 1)]
    return Exercise(f"Words: {', '.join(found)}\nList:\n", "".join(lines))


def exercises(texts: list[str], count: int, seed: int) -> list[str]:
    """So many to train on, copies and lists, some copied more than once."""
    rng, words, found = random.Random(seed), " ".join(texts).split(), []
    for _ in range(count):
        if rng.random() < 0.25:
            found.append("".join(listing(rng, words)))
            continue
        prompt, answer = copying(rng, words, rng.random() < _CHAOTIC)
        found.append(prompt + "Copy:\n".join([answer] * rng.randint(1, 3)))
    return found
