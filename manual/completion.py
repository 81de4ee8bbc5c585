"""``python launch.py completion SHELL``: a script by which a shell completes ``weight-feeder``.

Of shtab's making; it needs nothing of this project when it runs.
"""

from __future__ import annotations

import argparse
import sys

from common.errors import EXIT_ERROR, EXIT_OK
from common.log import report_error
from common.parser import Parser

SHELLS = ("bash", "zsh", "fish")
PROGRAM = "weight-feeder"
#: Flags that take a file, and those that take a directory.
_FILES = {"prompts", "output", "profile", "trace", "config", "plot"}
_DIRECTORIES = {"model", "store", "model_dir", "store_dir"}


def make_parser() -> Parser:
    """The parser of this command."""
    parser = Parser(
        examples="""\
  eval "$(weight-feeder completion bash)"
  weight-feeder completion fish | source
""",
        usage="%(prog)s SHELL",
        prog="python launch.py completion",
        description="Prints a script by which a shell completes weight-feeder.",
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    return parser


def script(shell: str) -> str:
    """The script for ``shell``. ImportError without shtab."""
    import shtab

    return str(shtab.complete(_tree(), shell))


def _tree() -> argparse.ArgumentParser:
    """One parser of argparse's own for all commands, as shtab takes them."""
    from manual.commands import commands

    found = {command.word: command.parser for command in commands() if command.word is not None}
    top = argparse.ArgumentParser(prog=PROGRAM, parents=[_plain(found.pop(""))], add_help=False)
    words = top.add_subparsers(metavar="COMMAND")
    for word, parser in found.items():
        about = (parser.description or "").partition(". ")[0]
        words.add_parser(word, parents=[_plain(parser)], add_help=False, help=about)
    return top


def _plain(parser: Parser) -> argparse.ArgumentParser:
    """The parser with the marks that shtab looks for."""
    import shtab

    for action in parser._actions:
        if action.dest in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest in _DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    return parser


def main(argv: list[str]) -> int:
    shell = make_parser().parse_args(argv).shell
    try:
        text = script(shell)
    except ImportError:
        report_error("completion needs the package shtab: pip install shtab", EXIT_ERROR)
        return EXIT_ERROR
    print(text)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
