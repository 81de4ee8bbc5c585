"""``python -m engine``: generate with the weights that a feeder lends."""

from __future__ import annotations

import argparse
import sys

from common.arguments import Parser, add_common, add_engine
from common.entry import run_process
from common.process import Leash

_EPILOG = """\
examples:
  python -m engine --prompt 'Why is the sky blue?'
  python -m engine --prompts sums.jsonl --output answers.jsonl
  python -m pdb -m engine --prompt 'Hello'
"""


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="python -m engine",
        description="Generates text with a Qwen2 model whose weights a feeder lends.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_engine(parser)
    add_common(parser)
    arguments = parser.parse_args(argv)

    def work(leash: Leash) -> None:
        from engine.start import run

        run(arguments, leash)

    return run_process("engine", arguments.verbose, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
