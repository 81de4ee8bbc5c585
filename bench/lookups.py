"""What a lookup over the whole text finds, against one of the last few tokens: ``python -m bench.lookups``.

Texts are taken as given, so what a pass would have accepted can be counted without a model: each file of
this repository's documents and of its engine by itself, and once more after itself, as if asked to leave
every tenth line out. Words and signs are the tokens. docs/speculation.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from bench.record import ROOT, add_output, finish
from common.arguments import Parser
from common.config import MOST_CANDIDATES
from common.entry import run_process
from engine.lookup import Lookup

Guesses = Callable[[int], list[int]]  # what may follow so many tokens of the text
PATTERNS = ("docs/*.md", "engine/*.py")


def whole_text(text: list[int]) -> Guesses:
    """By the index that an engine uses."""
    lookup = Lookup()

    def guess(place: int) -> list[int]:
        for token in text[len(lookup) : place]:
            lookup.add(token)
        return lookup.guess(MOST_CANDIDATES)

    return guess


def last_tokens(text: list[int], most: int) -> Guesses:
    """By transformers: where the last ``most`` tokens have been before, or else fewer."""
    ids: Any = torch.tensor([text])
    found = PromptLookupCandidateGenerator(
        num_output_tokens=MOST_CANDIDATES, max_matching_ngram_size=most, max_length=len(text) + 99
    )

    def guess(place: int) -> list[int]:
        candidates, _ = found.get_candidates(ids[:, :place])
        return [int(token) for token in candidates[0, place:]]

    return guess


def passes(text: list[int], place: int, guess: Guesses) -> int:
    """How many it takes to come from ``place`` to the end."""
    count = 0
    while place < len(text):
        count += 1
        for token in guess(place):
            if place + 1 >= len(text) or text[place] != token:
                break
            place += 1
        place += 1  # the model's own
    return count


def texts(pattern: str) -> dict[str, list[tuple[list[int], int]]]:
    """By kind: tokens, and how many of them were the prompt."""
    numbers: dict[str, int] = {}

    def tokens(lines: list[str]) -> list[int]:
        words = re.findall(r"\w+|\s+|[^\w\s]", "".join(lines))
        return [numbers.setdefault(word, len(numbers)) for word in words]

    alone, edited = [], []
    for file in sorted(ROOT.glob(pattern)):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        prompt = tokens(lines)
        alone.append((prompt, 1))
        kept = [line for number, line in enumerate(lines, 1) if number % 10]
        edited.append((prompt + tokens(kept), len(prompt)))
    return {"alone": alone, "edited": edited}


def measured(found: list[tuple[list[int], int]], most: int) -> dict[str, float]:
    """``most``: of the last tokens, that count; 0 for the whole text."""
    total = sum(len(text) - place for text, place in found)
    start = time.perf_counter()
    count = sum(
        passes(text, place, last_tokens(text, most) if most else whole_text(text))
        for text, place in found
    )
    seconds = time.perf_counter() - start
    return {
        "tokens_per_pass": round(total / count, 2),
        "us_per_token": round(1e6 * seconds / total),
    }


def run(arguments: argparse.Namespace) -> None:
    rows = []
    for pattern in PATTERNS:
        for kind, found in texts(pattern).items():
            for most in (0, *arguments.last):
                name = f"last {most}" if most else "whole text"
                rows.append(
                    {"texts": pattern, "kind": kind, "lookup": name, **measured(found, most)}
                )
                print(*rows[-1].values(), sep="\t", file=sys.stderr, flush=True)
    print(json.dumps(finish({"rows": rows}, arguments.output)))


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="python -m bench.lookups", description="The whole text or its last tokens."
    )
    parser.add_argument(
        "--last", type=int, nargs="+", default=[2, 3], metavar="N", help="tokens, at most"
    )
    add_output(parser)
    arguments = parser.parse_args(argv)

    return run_process("bench", False, lambda _: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
