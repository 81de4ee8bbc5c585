"""Where a flag gets its value when the command line does not say: the environment, then a TOML file.

``WEIGHT_FEEDER_CACHE=32`` and ``cache = 32`` say what ``--cache 32`` says. Knows argparse's actions, and
no flag by its meaning. Imports nothing heavy: every command comes through here.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UsageError

PREFIX = "WEIGHT_FEEDER_"
CONFIG_VARIABLE = f"{PREFIX}CONFIG"
#: Commands that run a model: what stands at the top of a file is for all of these.
RUNS = ("run", "serve", "chat", "feeder")
#: All that may have a table of their own in a file.
COMMANDS = (
    *RUNS, "quantize", "doctor", "status", "swap", "stop", "simulate", "bench",
)  # fmt: skip
#: Of other commands only these are taken from the top of a file: ``cache`` would change what `swap` does.
EVERYWHERE = frozenset({"name", "device", "verbose", "log_format"})
#: Never a setting.
_NOT = frozenset({"help", "help_all", "config"})
#: So go on the variables by which clusters announce a service that is called weight-feeder.
_CLUSTERS = ("SERVICE_", "PORT_")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True)
class Setting:
    """A value from elsewhere, and where it stands, for errors."""

    value: object
    where: str


def config_path(asked: str | None, environment: Mapping[str, str]) -> Path | None:
    """The file to read: ``asked`` for, or named by the variable, or the user's own if there is one.
    None without one; an empty name asks for none."""
    text = environment.get(CONFIG_VARIABLE) if asked is None else asked
    if text is not None:
        return Path(os.path.expanduser(text)) if text else None
    home = environment.get("XDG_CONFIG_HOME") or "~/.config"
    path = Path(os.path.expanduser(home)) / "weight-feeder" / "config.toml"
    return path if os.path.exists(path) else None


def read_settings(
    command: str,
    names: Iterable[str],
    shared: Iterable[str],
    path: Path | None,
    environment: Mapping[str, str],
) -> dict[str, Setting]:
    """What file and environment say of a command's flags ``names``, by name with underscores.

    ``shared``: all flags of commands that run a model. UsageError for a key that is no flag's.
    """
    names, shared = set(names) - _NOT, set(shared) - _NOT
    found: dict[str, Setting] = {}
    if path is not None:
        for name, setting in _from_file(command, names, shared, path):
            if name in names:
                found[name] = setting
    for prefix, allowed in _prefixes(command, names):
        for name in allowed:
            variable = f"{prefix}{name.upper()}"
            announced = name == "port" and "://" in environment.get(variable, "")  # by a cluster
            if environment.get(variable) and not announced:
                found[name] = Setting(environment[variable], variable)
    return found


def misspelt(environment: Mapping[str, str], names: Iterable[str]) -> Iterator[str]:
    """A line for each variable that looks like a setting's and is none."""
    known = {name.upper() for name in (*names, *EVERYWHERE, "config", "leash")}
    known |= {f"{command.upper()}_{name}" for command in COMMANDS for name in known}
    for variable in sorted(environment):
        name = variable.removeprefix(PREFIX)
        if name == variable or name in known or name.startswith(_CLUSTERS):
            continue
        near = difflib.get_close_matches(name, known, 1, 0.85)
        if near:  # else it may be a later version's
            meant = f"{PREFIX}{near[0]}"
            yield f"the variable {variable} is not known and ignored: do you mean {meant}?"


def convert(action: argparse.Action, setting: Setting) -> object:
    """The value that the flag would have. UsageError, naming the place, if it cannot be."""
    value, where = setting.value, setting.where
    if action.nargs == 0:
        text = str(value).lower()
        if not isinstance(value, bool) and text not in _TRUE + _FALSE:
            raise UsageError(f"{where}: {_short(value)} found: expected true or false")
        return value if isinstance(value, bool) else text in _TRUE
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{where}: {_short(value)} found: expected a number or a text")
    kind: Any = action.type
    try:
        made = str(value) if kind is None else kind(str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        name = getattr(kind, "__name__", "")
        expected = {"int": "a whole number", "float": "a number"}.get(name, "another value")
        raise UsageError(f"{where}: {_short(value)} found: expected {expected}") from None
    if action.choices is not None and made not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise UsageError(f"{where}: {_short(value)} found: expected one of {choices}")
    return made


def nearest(name: str, names: Iterable[str]) -> str:
    """``: do you mean X?``, or nothing if nothing is near."""
    near = difflib.get_close_matches(name, sorted(names), 1, 0.6)
    return f": do you mean {near[0]}?" if near else ""


def _prefixes(command: str, names: set[str]) -> Iterator[tuple[str, set[str]]]:
    """Of variables, the general ones first: those of the command come before them in what counts."""
    yield PREFIX, names if command in RUNS else names & EVERYWHERE
    yield f"{PREFIX}{command.upper()}_", names


def _from_file(
    command: str, names: set[str], shared: set[str], path: Path
) -> Iterator[tuple[str, Setting]]:
    """The top of the file, then the command's table."""
    content = _read(path)
    top = shared | EVERYWHERE
    for key, value in content.items():
        if isinstance(value, dict):
            if key not in COMMANDS:
                raise UsageError(f"{path}: [{key}] is no command{nearest(key, COMMANDS)}")
            continue
        name = key.replace("-", "_")
        if name not in top:
            near = nearest(name, names) or nearest(name, top)
            raise UsageError(f"{path}: {key} is not known{near}")
        if command in RUNS or name in EVERYWHERE:
            yield name, Setting(value, f"{path}: {key}")
    own = shared if command in RUNS else names
    for key, value in content.get(command, {}).items():
        name = key.replace("-", "_")
        if name not in own:
            near = nearest(name, names) or nearest(name, own)
            raise UsageError(f"{path}: {command}.{key} is not known{near}")
        yield name, Setting(value, f"{path}: {command}.{key}")


def _read(path: Path) -> dict[str, Any]:
    import tomllib  # seldom needed

    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UsageError(f"config file {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, too; a null byte in the name
        text = " ".join(str(error).split())
        raise UsageError(f"config file {path} is not TOML: {text}") from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
