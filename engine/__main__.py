"""``python -m engine [serve|chat]``: generate with the weights that a feeder lends."""

from __future__ import annotations

import sys
from importlib import import_module

from common.arguments import add_chat, add_common, add_engine, add_server, run_parser
from common.entry import run_process
from common.parser import Parser
from common.process import Leash
from common.quick_imports import quick_imports

_EXAMPLES = """\
  python -m engine --prompt 'Why is the sky blue?'
  python -m engine --prompts sums.jsonl --output answers.jsonl
  python -m engine serve --port 8000
  python -m engine chat
  python -m pdb -m engine --prompt 'Hello'
"""
_FLAGS = {"": add_engine, "serve": add_server, "chat": add_chat}
_MODULES = {"": "engine.start", "serve": "engine.serve.start", "chat": "engine.chat.start"}


def make_parser(command: str = "") -> Parser:
    """The parser of ``python -m engine COMMAND``."""
    parser = run_parser(
        command or "run", f"python -m engine {command}".rstrip(),
        "Generates text with a model whose weights a feeder lends.", _EXAMPLES,
    )  # fmt: skip
    _FLAGS[command](parser)
    add_common(parser)
    return parser


def main(argv: list[str]) -> int:
    command = argv[0] if argv and argv[0] in _FLAGS else ""
    parser = make_parser(command)
    parser.check_word(argv, _FLAGS)
    arguments = parser.parse_args(argv[1:] if command else argv)

    def work(leash: Leash) -> None:
        with quick_imports():  # only now: they import torch
            module = import_module(_MODULES[command])
        module.run(arguments, leash)

    return run_process("engine", arguments.verbose, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
