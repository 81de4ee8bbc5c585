"""The flags of feeder and engine, said once: their own parsers and the launcher's are made of these.

Imports nothing heavy, so that ``--help`` and the launcher start at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from common.config import DTYPES, SLOTS
from common.errors import EXIT_USAGE

#: The server's key, where it is not given as a flag.
API_KEY_VARIABLE = "WEIGHT_FEEDER_API_KEY"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(EXIT_USAGE)


def add_common(parser: argparse._ActionsContainer) -> list[argparse.Action]:
    """Flags that both processes take, so that the launcher gives them to both."""
    return [
        parser.add_argument(
            "--name", default="default", help="picks the run directory; one feeder a name"
        ),
        parser.add_argument("--verbose", action="store_true", help="log more"),
        parser.add_argument(
            "--verify", action="store_true",
            help="checksum every slot at fill, grant and release, and poison it when freed",
        ),
        parser.add_argument(
            "--trace", metavar="FILE",
            help="write a timeline of both processes there, for ui.perfetto.dev",
        ),
    ]  # fmt: skip


def add_feeder(parser: argparse._ActionsContainer) -> list[argparse.Action]:
    """The feeder's flags, less --model and --name."""
    return [
        parser.add_argument(
            "--cache", default="auto", metavar="N|SIZE|auto",
            help="weights in slots at once: a number, -1 for all, bytes such as 10GiB,"
            " or auto (the default): as many as there is room for",
        ),
        parser.add_argument(
            "--vram", metavar="SIZE",
            help="device memory of both processes together, such as 8GiB; default: what is free",
        ),
        parser.add_argument(
            "--context", type=int, metavar="TOKENS",
            help="prompt and answer that memory is kept for; default: 4096, or the model's if less",
        ),
        parser.add_argument(
            "--strategy", default="resident", metavar="NAME|FILE:CLASS",
            help="resident (the default), ring, on-demand, or your own",
        ),
        parser.add_argument(
            "--slots", default="auto", choices=SLOTS,
            help="what slots hold: INT4 as it is, or the model's dtype; auto: what is faster",
        ),
        parser.add_argument("--device", default="auto", help="auto, cuda, cuda:INDEX or cpu"),
        parser.add_argument(
            "--dtype", default="auto", choices=("auto", *DTYPES),
            help="of slots and model; auto: the checkpoint's on CUDA, float32 on the CPU",
        ),
        parser.add_argument(
            "--keep-store", action="store_true",
            help="leave the host store in /dev/shm for the next feeder of this name",
        ),
    ]  # fmt: skip


def add_engine(parser: argparse._ActionsContainer) -> list[argparse.Action]:
    """The engine's flags, less --name."""
    prompts = [
        parser.add_argument("--prompt", metavar="TEXT", help="the text to answer"),
        parser.add_argument(
            "--prompts", metavar="FILE", help="JSON list or lines of {input, expected_output}"
        ),
        parser.add_argument("--output", metavar="FILE", help="answers of --prompts, as JSON lines"),
        parser.add_argument("--raw", action="store_true", help="leave the chat template out"),
    ]
    run = [
        parser.add_argument("--json", action="store_true", help="the summary as JSON, on stderr"),
        parser.add_argument(
            "--profile", metavar="FILE", help="torch's profile of three decoding passes, as a trace"
        ),
    ]
    return [*prompts, *_add_sampling(parser), *run, *_add_model(parser)]


def add_server(parser: argparse._ActionsContainer) -> list[argparse.Action]:
    """The flags of an engine that serves, less --name."""
    server = [
        parser.add_argument(
            "--host", default="127.0.0.1", metavar="ADDRESS",
            help="where to listen; another than this machine's own takes a key",
        ),
        parser.add_argument(
            "--port", type=int, default=8000, metavar="N", help="0: one that is free; default 8000"
        ),
        parser.add_argument(
            "--api-key", metavar="KEY",
            help=f"what clients must send; others here can read this flag, and not ${API_KEY_VARIABLE}",
        ),
        parser.add_argument(
            "--model-name", metavar="NAME", help="what clients call it; default: its directory's"
        ),
        parser.add_argument(
            "--max-tokens", type=int, default=4096, metavar="N",
            help="the longest answer that is served; default 4096",
        ),
        parser.add_argument(
            "--queue", type=int, default=64, metavar="N",
            help="requests that may wait, more are refused; default 64",
        ),
    ]  # fmt: skip
    return [*server, *_add_model(parser)]


def add_chat(parser: argparse._ActionsContainer) -> list[argparse.Action]:
    """The flags of an engine that chats, less --name."""
    system = parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    return [system, *_add_sampling(parser), *_add_model(parser)]


def _add_sampling(parser: argparse._ActionsContainer) -> list[argparse.Action]:
    return [
        parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default 512"),
        parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy"),
        parser.add_argument("--top-p", type=float, metavar="P"),
        parser.add_argument("--top-k", type=int, metavar="K"),
        parser.add_argument("--repetition-penalty", type=float, metavar="R"),
        parser.add_argument("--seed", type=int, metavar="N"),
        parser.add_argument("--greedy", action="store_true", help="the likeliest token, always"),
    ]


def _add_model(parser: argparse._ActionsContainer) -> list[argparse.Action]:
    return [
        parser.add_argument(
            "--attention", default="auto", choices=("auto", "flash_attention_2", "sdpa", "eager")
        ),
        parser.add_argument(
            "--speculate", default="auto", metavar="auto|off|lookup[:K]|DIR[:K]",
            help="check up to K tokens in one pass that the text so far suggests, or the small model"
            " in DIR (for an engine alone: draft[:K]); auto (the default): lookup, on the CPU, while"
            " weights are streamed",
        ),
        parser.add_argument(
            "--debugpy", type=int, metavar="PORT", help="wait for an editor's debugger on that port"
        ),
        parser.add_argument(
            "--no-step",
            action="store_true",
            help="transformers' forward pass for every token, no fused step and no CUDA graph",
        ),
        parser.add_argument(
            "--wait-full", action="store_true", help="fill the cache before the first prompt"
        ),
    ]  # fmt: skip


def as_flags(arguments: argparse.Namespace, actions: Sequence[argparse.Action]) -> list[str]:
    """The command line that gives ``actions`` the values in ``arguments``; defaults are left out."""
    flags: list[str] = []
    for action in actions:
        value = getattr(arguments, action.dest)
        if value == action.default:
            continue
        flag = action.option_strings[-1]
        flags.extend([flag] if value is True else [f"{flag}={value}"])
    return flags
