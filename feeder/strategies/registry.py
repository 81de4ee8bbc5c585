"""Strategies by name, and a user's own from a file."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from pathlib import Path

from common.errors import StrategyError
from feeder.strategies.base import Strategy
from feeder.strategies.on_demand import OnDemand
from feeder.strategies.resident import Resident
from feeder.strategies.ring import Ring

MAX_NAME = 64
BUILT_IN: dict[str, type[Strategy]] = {c.name: c for c in (Ring, Resident, OnDemand)}


def make_strategy(spec: str) -> Strategy:
    """A new strategy from a built-in name or ``path/to/file.py:Class``. StrategyError otherwise."""
    strategy = _make(spec)
    strategy.spec = spec
    return strategy


def _make(spec: str) -> Strategy:
    if spec in BUILT_IN:
        return BUILT_IN[spec]()
    path_text, colon, class_name = spec.rpartition(":")
    if not colon or not path_text.endswith(".py"):
        raise StrategyError(
            f"strategy {spec!r} is not known: name one of {', '.join(BUILT_IN)},"
            " or a class as path/to/file.py:Class"
        )
    return _load(Path(path_text), class_name)


def _load(path: Path, class_name: str) -> Strategy:
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise StrategyError(f"strategy file {path} does not exist: check the path")
    module_spec = importlib.util.spec_from_file_location(f"strategy_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise StrategyError(f"strategy file {path} cannot be imported: it must be a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up by its name
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_spec.name]
        raise StrategyError(f"strategy file {path} fails to import: {error!r}: mend it") from error
    found = getattr(module, class_name, None)
    if not (inspect.isclass(found) and issubclass(found, Strategy)):
        raise StrategyError(
            f"{path} has no class {class_name} derived from feeder.strategies.base.Strategy"
        )
    try:
        strategy = found()
    except (Exception, SystemExit) as error:
        raise StrategyError(f"{class_name}() of {path} raises {error!r}: mend it") from error
    name = strategy.name
    if type(name) is not str or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise StrategyError(f"{class_name}.name of {path} is no text of 1 to {MAX_NAME} characters")
    return strategy
