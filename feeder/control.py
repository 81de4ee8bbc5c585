"""``python -m feeder status|swap|stop``: talks to a running feeder. Imports no torch."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from common import protocol as p
from common.ask import SWAP_PATIENCE_S, FeederEnded, ask
from common.config import SLOTS, Cache
from common.errors import EXIT_INTERRUPTED, EXIT_OK, PeerError, WeightFeederError
from common.log import report_error
from common.parser import Parser
from common.process import Lock, run_directory
from feeder.watch import Screen, table, view

__all__ = ["FeederEnded", "ask", "main"]

_ABOUT = {
    "status": ("What a running feeder does.", """\
  python -m feeder status
  python -m feeder status --watch
"""),
    "swap": ("Changes strategy, cache and slots of a running feeder, between two weights.", """\
  python -m feeder swap ring
  python -m feeder swap resident --cache 10GiB --slots packed
"""),
    "stop": ("Ends a running feeder.", """\
  python -m feeder stop --name second
"""),
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the command line ``argv`` (its first word is the command); the exit code."""
    work = {"status": _status, "swap": _swap, "stop": _stop}[argv[0]]
    arguments = make_parser(argv[0]).parse_args(argv[1:])
    try:
        work(arguments)
    except WeightFeederError as error:
        report_error(str(error), error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
    return EXIT_OK


def make_parser(command: str) -> Parser:
    """The parser of ``python -m feeder COMMAND``."""
    about, examples = _ABOUT[command]
    parser = Parser(
        command, examples=examples, prog=f"python -m feeder {command}", description=about
    )
    add = parser.add_argument
    if command == "status":
        add("--json", action="store_true", help="one JSON object")
        add("--watch", action="store_true", help="again every second, until Ctrl-C")
    if command == "swap":
        parser.usage = "%(prog)s NAME|FILE:CLASS [FLAGS]"
        add("strategy", metavar="NAME|FILE:CLASS", help="as --strategy of the feeder takes it")
        add("--cache", default="", metavar="N|SIZE", help="change the cache too")
        add("--slots", default="", choices=SLOTS, metavar="KIND",
            help=f"change what slots hold, too: {', '.join(SLOTS)}")  # fmt: skip
    add("--name", default="default", help="the feeder's --name")
    return parser


def _swap(arguments: argparse.Namespace) -> None:
    strategy = arguments.strategy
    path, colon, name = strategy.rpartition(":")
    if colon:  # the feeder has a working directory of its own
        strategy = f"{Path(path).resolve()}:{name}"
    if arguments.cache:
        Cache.parse(arguments.cache)
    request = p.Swap(strategy, arguments.cache, arguments.slots)
    answer = ask(arguments.name, request, SWAP_PATIENCE_S)
    print(answer.text if isinstance(answer, p.Done) else answer)


def _stop(arguments: argparse.Namespace) -> None:
    try:
        ask(arguments.name, p.Stop())
    except FeederEnded:
        return  # that was the answer
    lock = run_directory(arguments.name) / "feeder.lock"
    deadline = time.monotonic() + SWAP_PATIENCE_S
    while Lock.holder(lock) is not None:
        if time.monotonic() > deadline:
            raise PeerError(f"feeder {arguments.name!r} was asked to end and has not")
        time.sleep(0.02)


def _status(arguments: argparse.Namespace) -> None:
    with Screen(sys.stdout, live=arguments.watch and not arguments.json) as screen:
        before: p.Fields = {}
        while True:
            asked_s = time.monotonic()
            answer = ask(arguments.name, p.StatusRequest())
            fields = answer.fields if isinstance(answer, p.Status) else {}
            if arguments.json:
                screen.show([json.dumps(fields)])
            elif arguments.watch:
                screen.show(view(fields, before, screen.width, screen.style))
            else:
                screen.show(table(fields))
            if not arguments.watch:
                return
            before = fields | {"asked_s": asked_s}
            time.sleep(1.0)
