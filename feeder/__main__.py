"""``python -m feeder``: serve a store, or talk to the feeder that does."""

from __future__ import annotations

import sys

from common.arguments import add_common, add_feeder, run_parser
from common.entry import run_process
from common.parser import Parser
from common.process import Leash
from common.quick_imports import quick_imports

_EXAMPLES = """\
  python -m feeder --model STORE --cache 128
  python -m feeder swap resident --cache 10GiB
  python -m feeder status --watch
  python -m feeder stop
other commands: swap, status, stop, simulate (each with --help); python -m feeder.doctor
"""


def make_parser() -> Parser:
    """The parser of a feeder that serves."""
    parser = run_parser(
        "feeder", "python -m feeder",
        "Keeps an INT4 store in pinned host memory and feeds an engine from it.", _EXAMPLES,
    )  # fmt: skip
    parser.add_argument("--model", required=True, metavar="STORE", help="a store directory")
    parser.add_argument(
        "--draft",
        metavar="STORE",
        help="a small model's store, lent beside it for --speculate draft",
    )
    parser.add_argument("--plan", action="store_true", help="say what to expect, and serve nothing")
    parser.add_argument("--json", action="store_true", help="the plan as JSON")
    parser.add_argument(
        "--standby", action="store_true",
        help="start now, and serve when the feeder of this name has ended",
    )  # fmt: skip
    add_feeder(parser)
    add_common(parser)
    return parser


def main(argv: list[str]) -> int:
    if argv and argv[0] in ("swap", "status", "stop"):
        from feeder.control import main as control

        return control(argv)
    if argv and argv[0] == "simulate":
        from feeder.simulate import main as simulate

        return simulate(argv)
    parser = make_parser()
    parser.check_word(argv, ("swap", "status", "stop", "simulate"))
    arguments = parser.parse_args(argv)
    if arguments.json and not arguments.plan:
        parser.error("--json is for --plan")
    if arguments.standby and arguments.plan:
        parser.error("--standby is for a feeder that serves, and --plan serves nothing")

    def work(leash: Leash) -> None:
        with quick_imports():  # only now: they import torch
            from feeder.start import serve

        serve(arguments, leash)

    return run_process("feeder", arguments.verbose, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
