"""The flags of feeder and engine, said once: their own parsers and the launcher's are made of these.

Imports nothing heavy, so that ``--help`` and the launcher start at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common.config import DEFAULT_BATCH, DTYPES, SLOTS, Speculate, batch_of
from common.errors import UsageError
from common.parser import Parser

__all__ = ["Parser"]  # which most users of this module want, too

#: The server's key, where it is not given as a flag.
API_KEY_VARIABLE = "WEIGHT_FEEDER_API_KEY"

#: What stands together in a help. The flags of one command are some of these.
SECTIONS = {
    "model": ("model", "store", "system"),
    "prompts": ("prompt", "prompts", "output", "raw", "json"),
    "sampling": (
        "max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "greedy",
    ),
    "server": ("host", "port", "api_key", "model_name", "max_tokens", "queue"),
    "memory and weights": ("cache", "vram", "context", "strategy", "slots", "device", "dtype"),
    "speed": ("batch", "speculate", "attention", "no_step", "wait_full", "keep_store"),
    "looking inside": ("plan", "trace", "profile", "verify", "debug", "debugpy"),
    "processes": ("name", "feeder_only", "engine_only", "standby"),
}  # fmt: skip

#: Flags that few need: --help-all shows them, and docs/cli.md.
RARE = (
    "store", "raw", "profile", "top_p", "top_k", "repetition_penalty", "dtype", "attention", "no_step",
    "wait_full", "keep_store", "verify", "trace", "debugpy", "debug", "feeder_only", "engine_only",
    "queue", "model_name", "no_history",
)  # fmt: skip

#: What --help says of flags that take more words in --help-all.
SHORT = {
    "model": "a checkpoint or a store",
    "cache": "weights in slots: a number, -1 (all), or bytes",
    "vram": "device memory of both processes together",
    "context": "prompt and answer that memory is kept for",
    "strategy": "resident, ring, on-demand, or your own",
    "slots": "auto (the default), packed or dequantized",
    "batch": "sequences that share a pass, of serve and --prompts",
    "speculate": "check likely tokens in the same pass",
    "plan": "say what to expect, and run nothing",
    "api_key": f"what clients must send; better: ${API_KEY_VARIABLE}",
    "host": "where to listen; default: this machine alone",
}


def run_parser(
    command: str, prog: str, description: str, examples: str, rare: Sequence[str] = RARE
) -> Parser:
    """A parser, still without flags, for a command that runs a model or a part of it."""
    return Parser(command, SECTIONS, rare, SHORT, examples, prog=prog, description=description)


def shared_flags() -> list[str]:
    """The names of all flags that commands which run a model have."""
    every = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
    for add in (add_launcher, add_common, add_feeder, add_engine, add_server, add_chat):
        add(every)
    return [action.dest for action in every._actions]


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """The launcher's own flags."""
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="a checkpoint (a directory, or a GGUF file) or a store; default: the demo model",
    )
    parser.add_argument(
        "--store", metavar="DIR", help="where a checkpoint's store goes; default: the user's cache"
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "--feeder-only", action="store_true", help="start no engine, print its command"
    )
    one.add_argument(
        "--engine-only", action="store_true", help="start no feeder, print its command"
    )
    one.add_argument(
        "--plan", action="store_true", help="say what to expect (--json: as JSON), and run nothing"
    )
    parser.add_argument(
        "--debug", action="store_true", help="the engine under pdb, with this terminal as its input"
    )


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
        parser.add_argument(
            "--batch", type=int, metavar="N",
            help="sequences that share each pass, and that memory is kept for; default:"
            f" {DEFAULT_BATCH} for serve and --prompts, else 1",
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
            "--slots", default="auto", choices=SLOTS, metavar="KIND",
            help="what slots hold: packed, INT4 as it is; dequantized, the model's dtype; auto (the"
            " default): what is faster",
        ),
        parser.add_argument("--device", default="auto", help="auto, cuda, cuda:INDEX or cpu"),
        parser.add_argument(
            "--dtype", default="auto", choices=("auto", *DTYPES), metavar="DTYPE",
            help=f"of slots and model: {', '.join(DTYPES)}; auto (the default): the checkpoint's on"
            " CUDA, float32 on the CPU",
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
    chat = [
        parser.add_argument("--system", metavar="TEXT", help="what the model is told first"),
        parser.add_argument(
            "--no-history", action="store_true", help="keep nothing that is typed for the next time"
        ),
    ]
    return [*chat, *_add_sampling(parser), *_add_model(parser)]


def _add_sampling(parser: argparse._ActionsContainer) -> list[argparse.Action]:
    return [
        parser.add_argument(
            "--max-new-tokens", type=int, metavar="N", help="of an answer; default 512"
        ),
        parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy"),
        parser.add_argument(
            "--top-p", type=float, metavar="P", help="of the likeliest tokens only"
        ),
        parser.add_argument("--top-k", type=int, metavar="K", help="so many of them; 0: all"),
        parser.add_argument(
            "--repetition-penalty", type=float, metavar="R", help="above 1: less of what was there"
        ),
        parser.add_argument("--seed", type=int, metavar="N", help="the same text again"),
        parser.add_argument("--greedy", action="store_true", help="the likeliest token, always"),
    ]


def _add_model(parser: argparse._ActionsContainer) -> list[argparse.Action]:
    return [
        parser.add_argument(
            "--attention", default="auto", choices=("auto", "flash_attention_2", "sdpa", "eager"),
            metavar="KIND", help="of prompts: auto (the default), flash_attention_2, sdpa or eager",
        ),
        parser.add_argument(
            "--speculate", default="auto", metavar="auto|off|lookup[:K]|DIR[:K]",
            help="check up to K tokens in one pass that the text so far suggests, or the small model"
            " in DIR (for an engine alone: draft[:K]); auto (the default): lookup while weights are"
            " streamed",
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


def batch_asked(arguments: argparse.Namespace, many: bool) -> int:
    """How many sequences an engine takes at once. ``many``: whether it is to get several. UsageError."""
    candidates = Speculate.parse(arguments.speculate).mode not in ("auto", "off")
    batch = batch_of(arguments.batch, DEFAULT_BATCH if many and not candidates else 1)
    if many and candidates and batch > 1:
        raise UsageError(
            f"--batch {batch} and --speculate {arguments.speculate}: candidates are checked for one"
            " sequence at a time: leave out one of the two"
        )
    return batch if many else 1


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
