"""``python -m feeder status|swap|stop``: talks to a running feeder. Imports no torch."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from common import protocol as p
from common.arguments import Parser
from common.channel import Client, Poller
from common.config import SLOTS, Cache, format_bytes
from common.errors import EXIT_INTERRUPTED, EXIT_OK, PeerError, WeightFeederError
from common.process import Lock, remove_run_directory, run_directory

PATIENCE_S = 5.0
SWAP_PATIENCE_S = 120.0  # a new arena waits for the weights that are in use


class FeederEnded(PeerError):
    """The feeder was there, and ended before it answered."""


def ask(name: str, request: p.Message, patience_s: float = PATIENCE_S) -> p.Message:
    """The answer of feeder ``name``. PeerError if it is not there, is silent, or refuses."""
    directory = run_directory(name)
    pid = Lock.holder(directory / "feeder.lock")
    if pid is None:
        remove_run_directory(directory)
        raise PeerError(
            f"no feeder {name!r} is running: start one with python -m feeder --model STORE"
        )
    client, poller = Client(directory / "feeder.sock"), Poller()
    client.register(poller)
    try:
        deadline = time.monotonic() + patience_s
        sent = False
        while time.monotonic() < deadline:
            # Asked before its messages are read: its last words may be on their way.
            ended = Lock.holder(directory / "feeder.lock") is None
            sent = sent or client.send(request)
            poller.wait(0.02 if not sent else 0.2)
            for message in client.receive():
                if isinstance(message, p.Failure):
                    raise PeerError(message.text)
                if isinstance(message, p.Status | p.Done):
                    return message
            if ended:
                raise FeederEnded(f"feeder {name!r}, pid {pid}, ended before it answered")
    finally:
        client.close()
    raise PeerError(f"feeder {name!r}, pid {pid}, does not answer: it is loading, or stopped")


def main(argv: list[str]) -> int:
    """Run the command line ``argv`` (its first word is the command); the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.work(arguments)
    except WeightFeederError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
    return EXIT_OK


def _parser() -> Parser:
    parser = Parser(prog="python -m feeder", description="Talks to a running feeder.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    status = commands.add_parser("status", help="what the feeder does")
    status.add_argument("--json", action="store_true", help="one JSON object")
    status.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")
    status.set_defaults(work=_status)
    swap = commands.add_parser("swap", help="change strategy and cache, while it runs")
    swap.add_argument("strategy", metavar="NAME|FILE:CLASS")
    swap.add_argument("--cache", default="", metavar="N|SIZE", help="change the cache too")
    swap.add_argument("--slots", default="", choices=SLOTS, help="change what slots hold, too")
    swap.set_defaults(work=_swap)
    stop = commands.add_parser("stop", help="end it")
    stop.set_defaults(work=_stop)
    for command in (status, swap, stop):
        command.add_argument("--name", default="default", help="the feeder's --name")
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
    while True:
        answer = ask(arguments.name, p.StatusRequest())
        fields = answer.fields if isinstance(answer, p.Status) else {}
        text = json.dumps(fields) if arguments.json else "\n".join(table(fields))
        if arguments.watch and not arguments.json and sys.stdout.isatty():
            text = f"\x1b[H\x1b[2J{text}"
        print(text, flush=True)
        if not arguments.watch:
            return
        time.sleep(1.0)


def table(fields: dict[str, Any]) -> list[str]:
    """The status as lines for people."""
    engine = "none"
    if fields.get("engine_pid"):
        engine = f"pid {fields['engine_pid']}"
        if "engine_uses" in fields:
            engine += (
                f", {fields['engine_uses']} uses, {fields['engine_waits']} waits,"
                f" stalled {fields['engine_stall_s']:.1f} s"
            )
        else:
            engine += ", does not answer (stopped?)"
    states = ("filling", "ready", "in_use", "revoked")
    slots = ", ".join(f"{fields[f'slots_{s}']} {s.replace('_', ' ')}" for s in states)
    rows = {
        "feeder": f"pid {fields['pid']}, {fields['dtype']} on {fields['device']}",
        "store": f"{fields['store']} ({fields['weights']} weights,"
        f" {format_bytes(fields['packed_bytes'])}, {fields['fingerprint']})",
        "strategy": f"{fields['strategy']}, cache {fields['cache']}:"
        f" {fields['slots']} weights in {format_bytes(fields['arena_bytes'])}",
        "slots": f"{slots}; {fields['standing']} standing",
        "hit rate": f"{100 * fields['hit_rate']:.1f} % in the last pass of {fields['passes']}",
        "link": f"{fields['link_bytes_per_s'] / 1e9:.2f} GB/s now,"
        f" {format_bytes(fields['streamed_bytes'])} in {fields['fills']} fills",
        "engine": engine,
    }
    if fields.get("draft"):
        rows["draft"] = f"{fields['draft']}, {format_bytes(fields['draft_bytes'])} of slots"
    return [f"{name:9} {text}" for name, text in rows.items()]
