"""``python -m manual``: write docs/cli.md anew, or ``--check`` that it is what the parsers say."""

from __future__ import annotations

import sys
from pathlib import Path

from common.errors import EXIT_ERROR, EXIT_OK
from common.log import report_error
from common.parser import Parser
from manual.page import page

PATH = Path(__file__).resolve().parents[1] / "docs" / "cli.md"


def main(argv: list[str]) -> int:
    parser = Parser(
        examples="  python -m manual\n  python -m manual --check\n",
        prog="python -m manual",
        description="Writes docs/cli.md from the commands' parsers.",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; 1 if it is out of date"
    )
    arguments = parser.parse_args(argv)
    text = page()
    if arguments.check:
        if PATH.read_text(encoding="utf-8") != text:
            report_error("docs/cli.md is out of date: run python -m manual", EXIT_ERROR)
            return EXIT_ERROR
        return EXIT_OK
    PATH.write_text(text, encoding="utf-8")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
