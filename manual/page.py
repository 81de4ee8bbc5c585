"""docs/cli.md as a text: what all commands have in common, then each command with all its flags."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from common import errors
from common.settings import COMMANDS, EVERYWHERE, RUNS
from manual.commands import Command, commands

_CODES = {
    errors.EXIT_OK: "all went well",
    errors.EXIT_ERROR: "something failed: the last line on stderr says what; of `doctor`: a check failed",
    errors.EXIT_USAGE: "the command line, a variable or the config file asks for what cannot be",
    errors.EXIT_INTERRUPTED: "ended by Ctrl-C (SIGINT)",
    errors.EXIT_TERMINATED: "ended by SIGTERM; other signals: 128 and their number",
}


def page() -> str:
    """The whole page."""
    every = list(commands())
    codes = "\n".join(f"| {code} | {meaning} |" for code, meaning in sorted(_CODES.items()))
    head = Path(__file__).with_name("head.md").read_text(encoding="utf-8")
    filled = head.format(
        contents=_contents(every),
        runs=", ".join(f"`{name}`" for name in RUNS),
        everywhere=", ".join(f"`{name}`" for name in sorted(EVERYWHERE)),
        tables=", ".join(f"`{name}`" for name in COMMANDS),
        codes=codes,
    )
    return "".join([filled, "\n", *map(_section, every)]).rstrip("\n") + "\n"


def _contents(every: list[Command]) -> str:
    lines = ["| command | what it does |", "|---|---|"]
    for command in every:
        anchor = re.sub(r"[^\w -]", "", command.title).lower().replace(" ", "-")
        about = (command.parser.description or "").partition(". ")[0].rstrip(".")
        lines.append(f"| [{command.title}](#{anchor}) | {about} |")
    return "\n".join(lines)


def _section(command: Command) -> str:
    parser = command.parser
    lines = [f"## {command.title}", "", " ".join((parser.description or "").split()), ""]
    lines += ["```text", parser.format_usage().strip().removeprefix("usage: "), "```", ""]
    for title, actions in parser.sections(everything=True):
        rows = [_row(action) for action in actions if action.dest not in ("help", "help_all")]
        if rows:
            lines += [f"| {title} | |", "|---|---|", *rows, ""]
    if parser.epilog:
        lines += ["```bash", *_examples(parser.epilog), "```", ""]
    return "\n".join(lines) + "\n"


def _row(action: argparse.Action) -> str:
    name = (
        action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)
    )
    value = ""
    if action.option_strings and action.nargs != 0:
        words = (
            "|".join(map(str, action.choices)) if action.choices and not action.metavar else None
        )
        value = f" {words or action.metavar or action.dest.upper()}"
    about = (action.help or "") % {"prog": "", "default": action.default}
    return f"| `{name}{_escaped(value)}` | {_escaped(about)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _examples(epilog: str) -> Iterator[str]:
    for line in epilog.splitlines():
        if line.startswith("  "):
            yield line.strip()
