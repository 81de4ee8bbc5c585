"""Strategies by name, and a user's own from a file."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path

from common.config import STRATEGIES, strategy_file
from common.errors import StrategyError
from feeder.strategies.base import Strategy
from feeder.strategies.on_demand import OnDemand
from feeder.strategies.resident import Resident
from feeder.strategies.ring import Ring

MAX_NAME = 64
BUILT_IN: dict[str, type[Strategy]] = dict(zip(STRATEGIES, (Ring, Resident, OnDemand), strict=True))


def make_strategy(spec: str) -> Strategy:
    """A new strategy from a built-in name or ``path/to/file.py:Class``. StrategyError otherwise."""
    strategy = _make(spec)
    strategy.spec = spec
    return strategy


def _make(spec: str) -> Strategy:
    file = strategy_file(spec)
    return BUILT_IN[spec]() if file is None else _load(*file)


def reason(error: BaseException) -> str:
    """What a user's code raised, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _load(path: Path, class_name: str) -> Strategy:
    module_spec = importlib.util.spec_from_file_location(f"strategy_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise StrategyError(f"strategy file {path} cannot be imported: it must be a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up by its name
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_spec.name]
        raise StrategyError(f"strategy file {path} fails to import: {reason(error)}") from error
    found = getattr(module, class_name, None)
    if not (inspect.isclass(found) and issubclass(found, Strategy)):
        raise StrategyError(
            f"{path} has no class {class_name} derived from feeder.strategies.base.Strategy"
        )
    try:
        strategy = found()
    except (Exception, SystemExit) as error:
        raise StrategyError(f"{class_name}() of {path} raises {reason(error)}") from error
    if found.wanted is Strategy.wanted and "wanted" not in vars(strategy):
        raise StrategyError(f"{class_name} of {path} has no method wanted(self, position)")
    name = strategy.name
    if type(name) is not str or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise StrategyError(f"{class_name}.name of {path} is no text of 1 to {MAX_NAME} characters")
    return strategy
