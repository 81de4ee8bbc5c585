"""What a pass over several tokens costs against a pass of one: ``python -m bench.widths``.

The passes of an engine that decodes: they take the step, if there is one that takes so many tokens, else the
model's forward, over the same past. Widths take turns, so that none has the link to itself.
docs/speculation.md.
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
from common.config import MOST_CANDIDATES
from common.entry import run_process
from common.errors import UsageError

WIDTHS = (1, 2, 4, 8, 16)
WARM_UP = 2


def measure(fed: Fed, past_tokens: int, rounds: int) -> dict[int, list[float]]:
    """Milliseconds of passes, by how many tokens they are over, after a prompt of ``past_tokens``."""
    from engine.cache import as_argument, make_cache, past

    model: Any = fed.model
    count = model.config.vocab_size
    cache = make_cache(model.config.num_hidden_layers, past_tokens + max(WIDTHS))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(count, (1, past_tokens + max(WIDTHS)), generator=generator)
    ids = ids.to(model.device)
    found: dict[int, list[float]] = {width: [] for width in WIDTHS}
    with torch.inference_mode():
        named = {**as_argument(cache), "use_cache": True}
        model(input_ids=ids[:, :past_tokens], logits_to_keep=1, **named)
        for turn in range(WARM_UP + rounds):
            for width in WIDTHS:
                start = time.perf_counter()
                tokens = ids[:, past_tokens : past_tokens + width]
                step = fed.step
                if step is None or not step.useful or width > step.most:
                    logits = model(input_ids=tokens, logits_to_keep=width, **named).logits[0]
                elif width == 1:
                    logits = step(tokens, cache)
                else:
                    logits = torch.cat(step.several(tokens, cache))
                logits.argmax(-1).tolist()  # waits
                if turn >= WARM_UP:
                    found[width].append(1000 * (time.perf_counter() - start))
                if step is not None:
                    step.rest()
                for layer in past(cache):
                    layer.set_length(past_tokens)
    return found


def run(arguments: argparse.Namespace) -> None:
    least = {"rounds": 1, "context": 1}
    for name, lowest in least.items():
        if getattr(arguments, name) < lowest:
            raise UsageError(f"--{name} {getattr(arguments, name)}: expected at least {lowest}")
    with Source(arguments.store, arguments.shape, torch.cuda.is_available()) as source:
        with Fed(source.store(), arguments.device, arguments.slots) as fed:
            fed.swap(arguments.strategy, arguments.cache)
            found = measure(fed, arguments.context, arguments.rounds)
        one = median(found[1])
        for width, ms in found.items():
            ratio = median(ms) / one
            line = f"{width:2} tokens: {median(ms):8.2f} ms a pass, {ratio:.3f} of a pass of one"
            print(line, file=sys.stderr, flush=True)
        figures = {
            width: {"ms": median(ms), "ratio": median(ms) / one} for width, ms in found.items()
        }
        about = {
            "model": source.name,
            "strategy": arguments.strategy,
            "slots": arguments.slots,
            "cache": arguments.cache,
        }
        result = {**about, "context": arguments.context, "widths": figures}
        print(json.dumps(finish(result, arguments.output)))


def main(argv: list[str]) -> int:
    assert WIDTHS[-1] == MOST_CANDIDATES + 1
    parser = Parser(prog="python -m bench.widths", description="Passes over 1 to 16 tokens, timed.")
    add_streamed(parser)
    parser.add_argument("--context", type=int, default=256, metavar="N", help="tokens of the past")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="passes of each width")
    add_output(parser)
    arguments = parser.parse_args(argv)

    return run_process("bench", False, lambda _: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
