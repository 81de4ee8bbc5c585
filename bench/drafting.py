"""What drafting takes against a streamed pass: ``python -m bench.drafting``.

One feeder lends both models, as in a run: the small one resident, the large one streamed. Between two
measured drafts the text grows as if all candidates had been right. docs/speculation.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from statistics import median
from typing import Any

import torch

from bench.fed import Fed
from bench.record import add_output, finish
from bench.source import Source, add_streamed
from bench.widths import measure as measure_widths
from common.arguments import Parser
from common.config import MOST_CANDIDATES
from common.entry import run_process
from common.errors import UsageError

WARM_UP = 3


def measure(fed: Fed, past_tokens: int, count: int, rounds: int) -> list[float]:
    """Milliseconds for ``count`` guesses after a text of at least ``past_tokens``."""
    from engine.draft import lent_draft

    draft = lent_draft(fed.client, fed.store, fed.memory, fed.dtype)

    def likeliest(ids: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, None]:
        return logits.to(torch.float32, copy=True).argmax(-1, keepdim=True), None

    vocabulary = min(fed.model.config.vocab_size, draft.vocabulary)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, past_tokens), generator=generator)
    found = []
    with torch.inference_mode():
        for turn in range(WARM_UP + rounds):
            text: Any = ids.to(fed.memory.device)
            start = time.perf_counter()
            tokens = draft.propose(text, count, likeliest).tokens
            if turn >= WARM_UP:
                found.append(1000 * (time.perf_counter() - start))
            own = torch.randint(vocabulary, (1, 1), generator=generator)
            ids = torch.cat([ids, torch.tensor([tokens]), own], dim=1)
    return found


def run(arguments: argparse.Namespace) -> None:
    for name, lowest, most in (("rounds", 1, 1 << 20), ("context", 1, 1 << 20), ("tokens", 1, 15)):
        if not lowest <= getattr(arguments, name) <= most:
            raise UsageError(
                f"--{name} {getattr(arguments, name)}: expected from {lowest} to {most}"
            )
    large = torch.cuda.is_available()
    with (
        Source(arguments.store, arguments.shape, large) as source,
        Source(arguments.draft, arguments.draft_shape, large) as small,
    ):
        of = (source.store(), arguments.device, arguments.slots)
        with Fed(*of, draft=small.store()) as fed:
            fed.swap(arguments.strategy, arguments.cache)
            passes = measure_widths(fed, arguments.context, arguments.rounds)
            drafts = measure(fed, arguments.context, arguments.tokens, arguments.rounds)
    one, wide, draft = median(passes[1]), median(passes[8]), median(drafts)
    print(
        f"a pass of one token {one:.2f} ms, of 8 {wide:.2f} ms; drafting {arguments.tokens} tokens"
        f" {draft:.2f} ms, {100 * draft / one:.1f} % of a pass of one",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    figures = {"pass_ms": one, "pass_of_8_ms": wide, "draft_ms": draft, "share": draft / one}
    about = {
        "model": source.name, "draft": small.name, "strategy": arguments.strategy, "slots": arguments.slots,
        "cache": arguments.cache, "context": arguments.context, "tokens": arguments.tokens,
    }  # fmt: skip
    print(json.dumps(finish({**about, **figures}, arguments.output)))


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m bench.drafting", description="Drafting, against a pass.")
    add_streamed(parser)
    parser.add_argument("--draft", metavar="STORE", help="draft with this store")
    parser.add_argument("--draft-shape", metavar="SHAPE", help="or with a random one, as 1.5b")
    parser.add_argument("--context", type=int, default=256, metavar="N", help="tokens of the past")
    parser.add_argument(
        "--tokens", type=int, default=8, metavar="N", help=f"1 to {MOST_CANDIDATES}"
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="drafts")
    add_output(parser)
    arguments = parser.parse_args(argv)

    return run_process("bench", False, lambda _: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
