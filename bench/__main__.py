"""``python -m bench``: measure a part at a time, or all, and plot it. docs/bench.md says how."""

from __future__ import annotations

import argparse
import sys

from bench.settings import SHAPE_HELP, SLOTS, STRATEGIES
from common.config import Cache
from common.entry import run_process
from common.errors import UsageError
from common.formats import DEQUANTIZED
from common.parser import Parser
from common.process import Leash

PARTS = ("ceilings", "sweep", "ttft", "baselines", "plot")
_EXAMPLES = """\
  python -m bench all --quick --output quick.json
  python -m bench all --shape qwen2.5-32b --output 32b.json --plot 32b.svg
  python -m bench sweep --store STORE --strategies resident --caches=16,8GiB,-1 --output 32b.json
"""


def parser() -> Parser:
    made = Parser(
        "bench",
        examples=_EXAMPLES,
        usage="%(prog)s PART... [FLAGS]",
        prog="python -m bench",
        description="Measures ceilings, a sweep of strategies and caches, the time to the first"
        " token, and baselines.",
    )
    add = made.add_argument
    add(
        "parts", nargs="+", choices=(*PARTS, "all"), metavar="PART", help=", ".join((*PARTS, "all"))
    )
    add("--store", metavar="STORE", help="measure this store")
    add("--shape", metavar="SHAPE", help=SHAPE_HELP)
    add("--output", metavar="FILE.json", help="what is in it already is not measured again")
    add("--plot", metavar="FILE.svg", help="draw the sweep there when all is done")
    add("--device", default="auto", help="auto, cuda, cuda:INDEX or cpu")
    add("--strategies", type=_words, default=STRATEGIES, metavar="A,B", help="of the sweep, ttft")
    add("--caches", type=_words, metavar="A,B", help="of the sweep, ttft; write --caches=-1,8")
    add("--slots", type=_words, default=(DEQUANTIZED,), metavar="A,B", help=", ".join(SLOTS))
    add(
        "--context", type=numbers, default=(0,), metavar="A,B", help="tokens in the KV cache before"
    )
    add("--tokens", type=int, metavar="N", help="timed for each setting; default 10, quick 3")
    add("--time-limit", type=float, default=20.0, metavar="S", help="for them; two at least")
    add("--prompt-tokens", type=numbers, metavar="A,B", help="of ttft; default 16,512,4096")
    add("--baseline-layers", type=int, default=8, metavar="N", help="that accelerate offloads")
    add("--descends-cache", type=int, default=128, metavar="N", help="of the synchronous copy")
    add("--again", action="store_true", help="try once more what failed")
    add("--quick", action="store_true", help="few settings; the default for the demo's store")
    add("--verbose", action="store_true", help="log more")
    return made


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)

    def work(leash: Leash) -> None:
        _check(arguments)
        from bench.run import run

        run(arguments, argv)

    return run_process("bench", arguments.verbose, work)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def numbers(text: str) -> tuple[int, ...]:
    """Of numbers with commas between."""
    return tuple(int(word) for word in _words(text))


def _check(arguments: argparse.Namespace) -> None:
    """Raises UsageError for what the parser lets pass, before minutes are spent."""
    for cache in arguments.caches or ():
        Cache.parse(cache)
    for kind in arguments.slots:
        if kind not in SLOTS:
            raise UsageError(f"slots {kind!r} are not known: name {', '.join(SLOTS)}")
    least = {"tokens": 2, "context": 0, "baseline_layers": 1, "prompt_tokens": 1}
    for name, lowest in least.items():
        value = getattr(arguments, name)
        found = value if isinstance(value, tuple) else (value,)
        if value is not None and min(found) < lowest:
            flag = f"--{name.replace('_', '-')} {','.join(map(str, found))}"
            raise UsageError(f"{flag}: expected at least {lowest}")
    if arguments.descends_cache < 1 and arguments.descends_cache != -1:
        raise UsageError(f"--descends-cache {arguments.descends_cache}: expected from 1, or -1")
    if not 0 < arguments.time_limit <= 3600:
        raise UsageError(f"--time-limit {arguments.time_limit}: expected above 0, at most 3600")
    if "plot" in arguments.parts and not arguments.plot:
        raise UsageError("the part plot needs --plot FILE.svg")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
