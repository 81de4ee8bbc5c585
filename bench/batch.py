"""What several sequences in a pass bring: ``python -m bench.batch``. docs/bench.md.

The passes of an engine that serves: sequences of an equal past that decode greedily, first one, then more
and more. One alone takes the step, if there is one.
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
from common.arguments import Parser
from common.entry import run_process
from common.errors import UsageError, WeightFeederError

WARM_UP = 3  # turns, of which the first takes the prompts


class _Owner:
    """Wants tokens, and looks at none."""

    wanted = True

    def __init__(self, generator: Any, prompt: list[int], tokens: int) -> None:
        self._generator, self._prompt, self._tokens = generator, prompt, tokens

    def request(self) -> Any:
        from engine.generate import Sampling

        sampling = Sampling(max_new_tokens=self._tokens, greedy=True)
        return self._generator.request(self._prompt, lambda text: None, sampling=sampling)

    def done(self, answer: Any) -> None:
        pass

    def failed(self, error: WeightFeederError) -> None:
        raise error


def measure(fed: Fed, keeper: Any, size: int, context: int, rounds: int) -> dict[str, Any]:
    """Milliseconds and streamed bytes of turns of ``size`` sequences, after prompts of ``context``
    tokens."""
    from engine.batch.batch import Batch
    from engine.batch.passes import Passes
    from engine.generate import Generator, Sampling
    from engine.loop import Loop
    from engine.text import TokenIds

    model: Any = fed.model
    vocabulary = model.config.vocab_size
    model.generation_config.eos_token_id = (
        None  # a text that ends early would leave the others alone
    )
    generator = Generator(
        model, TokenIds(vocabulary), Sampling(), True, Loop(fed.step, keeper.survive)
    )
    batch = Batch(model, Passes(model, fed.step, keeper.survive), keeper, size)
    random = torch.Generator().manual_seed(size)
    for _ in range(size):
        prompt = torch.randint(vocabulary, (context,), generator=random).tolist()
        batch.add(_Owner(generator, prompt, WARM_UP + rounds))
    ms: list[float] = []
    streamed = 0
    while not batch.idle:
        if len(ms) == WARM_UP:
            streamed = _streamed(fed)
        start = time.perf_counter()
        batch.turn()  # waits for its tokens
        ms.append(1000 * (time.perf_counter() - start))
        if len(ms) < WARM_UP + rounds and batch.running != size:
            raise UsageError(
                f"{size} sequences do not fit beside the slots: give a smaller --cache"
            )
    seconds = sum(ms[WARM_UP:]) / 1000
    streamed = _streamed(fed) - streamed
    batch.rest()
    return {
        "ms": round(median(ms[WARM_UP:]), 3),
        "all_ms": [round(one, 3) for one in ms[WARM_UP:]],
        "tok_per_s": round(size * rounds / seconds, 3),
        "streamed_bytes_a_pass": streamed // rounds,
        "link_gb_per_s": round(streamed / seconds / 1e9, 3),
    }


def _streamed(fed: Fed) -> int:
    fed.client.ask_status()
    return fed.client.streamed_bytes


def run(arguments: argparse.Namespace) -> None:
    """Measure and print. Raises WeightFeederError."""
    for name in ("rounds", "context"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} {getattr(arguments, name)}: expected at least 1")
    sizes = arguments.sizes
    with Source(arguments.store, arguments.shape, torch.cuda.is_available()) as source:
        room = max(sizes) * (arguments.context + arguments.rounds + WARM_UP + 256)
        with Fed(source.store(), arguments.device, arguments.slots, room) as fed:
            from engine.shortage import MemoryKeeper

            fed.swap(arguments.strategy, arguments.cache)
            keeper = MemoryKeeper(fed.model, fed.client, fed.memory)
            found = {
                size: measure(fed, keeper, size, arguments.context, arguments.rounds)
                for size in sizes
            }
    first = found[sizes[0]]["tok_per_s"]
    for size, figures in found.items():
        line = (
            f"{size:3} at once: {figures['ms']:8.2f} ms a pass, {figures['tok_per_s']:8.2f} tok/s,"
            f" {figures['tok_per_s'] / first:.2f} times that of {sizes[0]};"
            f" link {figures['link_gb_per_s']:.1f} GB/s"
        )
        print(line, file=sys.stderr, flush=True)
    result = {
        "model": source.name, "cache": arguments.cache, "strategy": arguments.strategy,
        "slots": arguments.slots, "context": arguments.context, "batches": found,
    }  # fmt: skip
    print(json.dumps(finish(result, arguments.output)))


def _sizes(text: str) -> list[int]:
    sizes = [int(word) for word in text.split(",")]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError("expected numbers from 1")
    return sizes


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m bench.batch", description="Passes of several sequences, timed.")
    add = parser.add_argument
    add_streamed(parser)
    add("--sizes", type=_sizes, default=[1, 2, 4, 8, 16], metavar="A,B", help="sequences at once")
    add("--context", type=int, default=256, metavar="N", help="tokens of each one's prompt")
    add("--rounds", type=int, default=10, metavar="N", help="passes that are timed")
    add_output(parser)
    arguments = parser.parse_args(argv)

    return run_process("bench", False, lambda _: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
