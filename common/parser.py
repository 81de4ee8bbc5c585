"""The command lines' parser: errors of one line, a help that fits a screen, settings from elsewhere.

Knows flags only as argparse does. Which of them are seldom needed, and which belong together, its users
say. Imports nothing heavy, so that ``--help`` and the launcher start at once.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from common import log
from common.errors import EXIT_USAGE, UsageError
from common.process import LEASH_VARIABLE
from common.settings import (
    PREFIX,
    RUNS,
    Setting,
    config_path,
    convert,
    misspelt,
    nearest,
    read_settings,
)

HELP_WIDTH = 100
_NO_KEY = Setting(None, "")
_FORMAT = f"{PREFIX}LOG_FORMAT"
_PATHS = ("DIR", "FILE", "STORE", "PATH")


class Parser(argparse.ArgumentParser):
    """``command``: whose settings are read, None for none. ``sections``: titles and the flags under
    them, in order. ``rare``: those that only --help-all shows. ``short``: what --help says of a flag,
    where that is less than --help-all does.
    """

    def __init__(
        self,
        command: str | None = None,
        sections: dict[str, tuple[str, ...]] | None = None,
        rare: Iterable[str] = (),
        short: dict[str, str] | None = None,
        examples: str = "",
        **more: Any,
    ) -> None:
        more.setdefault("formatter_class", _Formatter)
        more.setdefault("usage", "%(prog)s [FLAGS]")
        if examples:
            more["epilog"] = f"examples:\n{examples.rstrip()}"
        super().__init__(add_help=False, allow_abbrev=False, **more)
        self.command = command
        self._sections, self._rare = sections or {}, {*rare, "config", "log_format"}
        self._short = short or {}
        self.add_argument("-h", "--help", action=_Help, help="this text")
        self.add_argument("--help-all", action=_Help, help="with the flags that are seldom needed")
        if command is not None:
            self.add_argument(
                "--config", metavar="FILE",
                help="TOML file with values for flags; default: weight-feeder/config.toml under"
                " $XDG_CONFIG_HOME or ~/.config; '': none",
            )  # fmt: skip
        #: For those who hand it on to other processes.
        self.log_format = self.add_argument(
            "--log-format", choices=log.FORMATS, default="text", metavar="text|json",
            help="of the lines on stderr; json: one object each",
        )  # fmt: skip

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it, with settings for what is not given. Ends the process on a mistake."""
        argv = list(sys.argv[1:] if args is None else args)
        namespace = argparse.Namespace() if namespace is None else namespace
        try:
            log.choose_format(_early(argv, "--log-format") or os.environ.get(_FORMAT, ""))
            asks = not {"-h", "--help", "--help-all"}.isdisjoint(argv)
            settings = {} if asks else self._fill(argv, namespace)
            before = dict(vars(namespace))
            namespace, unknown = self.parse_known_args(argv, namespace)
            if unknown:
                self.error(f"unrecognized arguments: {' '.join(unknown)}{self._near(unknown[0])}")
            self._settle(namespace, before, settings)
            self._no_empty_paths(namespace)
        except UsageError as error:
            self.error(str(error))
        log.choose_format(namespace.log_format)
        return namespace

    def error(self, message: str) -> NoReturn:
        log.report_error(f"{message} (see {self.prog} --help)", EXIT_USAGE)
        sys.exit(EXIT_USAGE)

    def format_help(self, everything: bool = False) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        sections = list(self.sections(everything))
        for title, actions in sections:
            formatter.start_section(title)
            formatter.add_arguments(actions if everything else map(self._in_short, actions))
            formatter.end_section()
        formatter.add_text(self.epilog)
        text = formatter.format_help()
        if not everything:  # it is to fit a screen
            for title, _ in sections[1:]:
                text = text.replace(f"\n\n{title}:\n", f"\n{title}:\n", 1)
        return text

    def _in_short(self, action: argparse.Action) -> argparse.Action:
        short = copy.copy(action)
        short.help = self._short.get(action.dest, action.help)
        return short

    def sections(self, everything: bool) -> Iterator[tuple[str, list[argparse.Action]]]:
        """Titles, and what stands under them. What nobody has a title for comes last."""
        shown = [a for a in self._actions if everything or a.dest not in self._rare]
        shown = [a for a in shown if a.help is not argparse.SUPPRESS]
        titles = {dest: title for title, dests in self._sections.items() for dest in dests}
        found: dict[str, list[argparse.Action]] = {"arguments": []}
        found |= {title: [] for title in self._sections} | {"options": []}
        for action in shown:
            title = "options" if action.option_strings else "arguments"
            found[titles.get(action.dest, title)].append(action)
        yield from ((title, actions) for title, actions in found.items() if actions)

    def check_word(self, argv: Sequence[str], words: Iterable[str]) -> None:
        """A first word that is no flag is to be one of ``words``, the commands. Ends the process."""
        if argv and not argv[0].startswith("-") and argv[0] not in words:
            self.error(f"{argv[0]!r} is no command{nearest(argv[0], words)}")

    def _no_empty_paths(self, namespace: argparse.Namespace) -> None:
        """A shell's variable that is not set is not to mean this directory, or the default."""
        for action in self._actions:
            if action.dest == "config" or action.metavar not in _PATHS:
                continue
            if getattr(namespace, action.dest) == "":
                flag = action.option_strings[-1]
                raise UsageError(f"{flag} is empty: give a name, or leave it out")

    def _near(self, text: str) -> str:
        """The flag that was meant, for an error, if ``text`` is nearly one."""
        if not text.startswith("--"):
            return ""
        names = [flag[2:] for action in self._actions for flag in action.option_strings]
        return nearest(text[2:].partition("=")[0], names).replace("mean ", "mean --")

    def _fill(self, argv: Sequence[str], namespace: argparse.Namespace) -> dict[str, Setting]:
        """Give the namespace the settings' values: argparse takes them for what flags say."""
        launched = LEASH_VARIABLE in os.environ and self.command in RUNS
        if self.command is None or launched:  # a launcher has read them, and says what it found
            return {}
        from common.arguments import shared_flags  # which imports us

        path, shared = config_path(_early(argv, "--config"), os.environ), shared_flags()
        flags = {a.dest: a for a in self._actions if a.option_strings}
        settings = read_settings(self.command, flags, shared, path, os.environ)
        for line in misspelt(os.environ, {*flags, *shared}):
            log.report_warning(line)
        key_is_there = settings.get("api_key", _NO_KEY).where.startswith(f"{path}: ")
        if path is not None and key_is_there and path.stat().st_mode & 0o077:
            log.report_warning(f"{path} has a key, and others can read it: chmod 600 {path}")
        for name, setting in settings.items():
            setattr(namespace, name, convert(flags[name], setting))
            flags[name].required = False
        return settings

    def _settle(
        self, namespace: argparse.Namespace, before: dict[str, Any], settings: dict[str, Setting]
    ) -> None:
        """Of flags that exclude each other the command line's holds; two settings are a mistake."""
        for group in self._mutually_exclusive_groups:
            actions = group._group_actions
            set_ = [a for a in actions if getattr(namespace, a.dest) != a.default]
            given = [a for a in set_ if getattr(namespace, a.dest) != before.get(a.dest, a.default)]
            if len(set_) > 1 and not given:
                places = " and ".join(settings[action.dest].where for action in set_)
                raise UsageError(f"{places} exclude each other: leave one out")
            if given:
                for action in set_:
                    if action is not given[0]:
                        setattr(namespace, action.dest, action.default)


class _Help(argparse.Action):
    """``--help`` and ``--help-all``."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, Parser)
        sys.stdout.write(parser.format_help(everything=self.dest == "help_all"))
        parser.exit()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' lines, and flag and help on one line where they fit."""

    def __init__(self, prog: str, **more: Any) -> None:
        super().__init__(prog, max_help_position=31, **more)
        self._width = min(self._width, HELP_WIDTH)


def _early(argv: Sequence[str], flag: str) -> str | None:
    """What a flag says, looked up before the rest is understood."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument(flag, dest="found")
    try:
        found: str | None = early.parse_known_args(list(argv))[0].found
    except (argparse.ArgumentError, SystemExit):
        return None  # the parser itself says what is wrong
    return found
