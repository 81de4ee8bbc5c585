"""What a tree of candidates would bring against a chain of as many: ``python -m bench.trees``.

Greedy texts of a model, and what a draft says at every place of them: so what a pass would have accepted
can be counted without making it. A pass checks 15 candidates either way; a tree spends some of them on a
second way from its first place. docs/decisions/0010-no-trees.md.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.arguments import Parser
from common.config import MOST_CANDIDATES
from common.entry import run_process


def ranks(model: Any, draft: Any, prompt: list[int], tokens: int) -> list[int]:
    """Of each token of the model's text, how many the draft found likelier there: 0 for its guess."""
    text = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
    logits = draft(input_ids=text).logits[0, len(prompt) - 1 : -1]
    own = logits.gather(1, text[0, len(prompt) :, None])
    return [int(rank) for rank in (logits > own).sum(-1)]


def passes(found: list[int], chain: int, side: int) -> int:
    """How many passes a text of these ranks takes: each checks ``chain`` guesses in a row, and ``side``
    more from the second guess at its first place."""
    place = count = 0
    while place < len(found):
        count += 1
        limit = chain
        if side and found[place] == 1:
            place, limit = place + 1, side - 1
        while limit and place < len(found) and found[place] == 0:
            place, limit = place + 1, limit - 1
        place += 1  # the model's own
    return count


def simulated(right: float, second: float, tokens: int) -> list[int]:
    """Ranks of a draft that is right with such a chance, and, where it is wrong, by its second guess."""
    draw = random.Random(0)
    return [
        0 if draw.random() < right else 1 if draw.random() < second else 2 for _ in range(tokens)
    ]


def best(texts: list[list[int]], candidates: int) -> dict[str, Any]:
    """Tokens a pass of the chain, and of the best tree."""
    tokens = sum(map(len, texts))
    found = {
        side: tokens / sum(passes(text, candidates - side, side) for text in texts)
        for side in range(candidates)
    }
    side = max(found, key=lambda side: found[side])
    return {"chain": found[0], "tree": found[side], "side": side, "gain": found[side] / found[0]}


def run(arguments: argparse.Namespace) -> None:
    from demo import sums

    draw = random.Random(5)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model, draft = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (arguments.model, arguments.draft)
    )
    rows = []
    with torch.inference_mode():
        prompts = [sums.draw(draw, held_out=True).prompt for _ in range(arguments.sums)]
        texts = [ranks(model, draft, tokenizer(prompt).input_ids, 128) for prompt in prompts]
    flat = [rank for text in texts for rank in text]
    right = flat.count(0) / len(flat)
    second = flat.count(1) / max(1, len(flat) - flat.count(0))
    rows.append({"text": "sums", "right": right, "second": second})
    rows[0] |= best(texts, arguments.candidates)
    for right in (0.5, 0.6, 0.7, 0.8, 0.9):
        for second in (0.3, 0.5):
            made = [simulated(right, second, 30_000)]
            row = {"text": "made up", "right": right, "second": second}
            rows.append(row | best(made, arguments.candidates))
    for row in rows:
        print(
            f"{row['text']:8} right {row['right']:.3f}, else second {row['second']:.2f}: chain"
            f" {row['chain']:.2f} tokens a pass, tree {row['tree']:.2f} ({row['side']} aside),"
            f" {row['gain']:.3f}",
            file=sys.stderr,
        )  # fmt: skip
    print(json.dumps(rows))


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m bench.trees", description="A tree of candidates or a chain.")
    parser.add_argument("--model", default="demo/model", metavar="DIR")
    parser.add_argument("--draft", default="demo/draft", metavar="DIR")
    parser.add_argument("--sums", type=int, default=40, metavar="N")
    parser.add_argument("--candidates", type=int, default=MOST_CANDIDATES, metavar="N")
    arguments = parser.parse_args(argv)

    return run_process("bench", False, lambda _: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
