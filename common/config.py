"""Values of the command lines: sizes, caches, dtypes, speculation. Parsing and printing, nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from common.errors import StrategyError, UsageError

DTYPES = ("bfloat16", "float16", "float32")
SLOTS = ("auto", "packed", "dequantized")
STRATEGIES = ("ring", "resident", "on-demand")
#: With the token that is known, 16 a pass: the kernels cost as much for these as for one.
MOST_CANDIDATES = 15
#: Requests that are answered together, where nobody says how many: more would take other kernels.
DEFAULT_BATCH = 16
MOST_BATCH = 256

_UNITS = {
    "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip
#: What the sampling flags may be, by name: a range, and what errors say of it. NaN is in none.
_SAMPLING: dict[str, tuple[Callable[[float], bool], str]] = {
    "max_new_tokens": (lambda v: v >= 1, "at least 1"),
    "temperature": (lambda v: 0 <= v <= 100, "from 0 (greedy) to 100"),
    "top_p": (lambda v: 0 < v <= 1, "above 0, at most 1"),
    "top_k": (lambda v: v >= 0, "at least 0 (0: all)"),
    "repetition_penalty": (lambda v: 0 < v <= 100, "above 0, at most 100"),
    "seed": (lambda v: 0 <= v < 1 << 32, "from 0 to 2**32 - 1"),
}


def check_sampling(values: Mapping[str, Any]) -> None:
    """UsageError if a sampling flag, by name with underscores, is out of its range. None is any."""
    for name, (good, expected) in _SAMPLING.items():
        value = values.get(name)
        if value is not None and not good(value):
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected {expected}")


def parse_size(text: str) -> int:
    """Bytes from a size such as ``10GiB`` or ``500 MB``. UsageError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,19}(?:\.\d{1,18})?)\s*([A-Za-z]+)\s*", text)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None:
        raise UsageError(f"size {text!r} is not understood: write a number and a unit, as 10GiB")
    size_bytes = int(Fraction(match.group(1)) * unit)
    if size_bytes < 1:
        raise UsageError(f"size {text!r} is no size: give at least one byte")
    if size_bytes >= 1 << 63:
        raise UsageError(f"size {text!r} is beyond 64 bits: give at most 8388607TiB")
    return size_bytes


def strategy_file(text: str) -> tuple[Path, str] | None:
    """File and class of ``path/to/file.py:Class``, None for a strategy that comes with this program.
    StrategyError for anything else. What is in the file is for others to find out."""
    if text in STRATEGIES:
        return None
    path, _, kind = text.rpartition(":")
    if not path.endswith(".py") or not kind:
        raise StrategyError(
            f"strategy {text!r} is not known: name one of {', '.join(STRATEGIES)},"
            " or a class as path/to/file.py:Class"
        )
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise StrategyError(f"strategy file {path} does not exist: check the path")
    return Path(path), kind


def batch_of(asked: int | None, default: int) -> int:
    """``--batch``: how many sequences at once. UsageError for what cannot be."""
    if asked is not None and not 1 <= asked <= MOST_BATCH:
        raise UsageError(f"--batch {asked}: expected from 1 to {MOST_BATCH}")
    return default if asked is None else asked


def format_bytes(size_bytes: float) -> str:
    """A size for people: ``16.5 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"


@dataclass(frozen=True)
class Cache:
    """``--cache``: a number of weights (``count``; None for all), or bytes (``size_bytes``).

    ``auto``: all that the device has room for, which nobody calls too few.
    """

    count: int | None = None
    size_bytes: int | None = None
    auto: bool = False

    @classmethod
    def parse(cls, text: str) -> Cache:
        """From ``auto``, ``128``, ``-1`` or ``10GiB``. UsageError for anything else."""
        if text.strip().lower() == "auto":
            return cls(auto=True)
        if re.fullmatch(r"\s*[+-]?\d{1,18}\s*", text):
            count = int(text)
            if count == -1:
                return cls()
            if count < 1:
                raise UsageError(
                    f"cache {text!r} holds no weight: give a number from 1, -1 for all,"
                    " a size such as 10GiB, or auto"
                )
            return cls(count=count)
        try:
            return cls(size_bytes=parse_size(text))
        except UsageError:
            raise UsageError(
                f"cache {text!r} is not understood: give a number of weights, -1 for all,"
                " a size such as 10GiB, or auto"
            ) from None

    def __str__(self) -> str:
        if self.auto:
            return "auto"
        if self.size_bytes is not None:
            unit = max(
                (u for u in _UNITS if not self.size_bytes % _UNITS[u]), key=_UNITS.__getitem__
            )
            return f"{self.size_bytes // _UNITS[unit]}{unit.replace('I', 'i')}"
        return "-1" if self.count is None else str(self.count)


@dataclass(frozen=True)
class Speculate:
    """``--speculate``: ``mode`` is off, lookup, draft, or auto: lookup while weights are streamed.

    ``most``: candidates that a pass checks at most, beside the token it is made for. ``draft``: the
    draft model's directory, where it was given; an engine takes the one that its feeder has.
    """

    mode: str = "auto"
    most: int = MOST_CANDIDATES
    draft: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Speculate:
        """From ``off``, ``auto``, ``lookup``, ``lookup:4``, ``draft:4``, or a directory, ``DIR:4``.
        UsageError for anything else."""
        name, _, number = text.strip().rpartition(":")
        if not re.fullmatch(r"\d{1,9}", number) or os.path.isdir(os.path.expanduser(text)):
            name, number = text.strip(), ""
        mode, draft = name.lower(), None
        if mode not in ("off", "auto", "lookup", "draft"):
            draft = Path(os.path.expanduser(name))
            if not name or not draft.is_dir():
                raise UsageError(
                    f"speculate {text!r} is not understood, and no directory: give auto, off, lookup,"
                    f" lookup:K, or a draft model's directory, DIR or DIR:K, with K from 1 to"
                    f" {MOST_CANDIDATES}"
                )
            mode = "draft"
        most = int(number) if number else MOST_CANDIDATES
        if number and mode in ("off", "auto"):
            raise UsageError(f"speculate {text!r}: {mode} takes no number: leave :{number} out")
        if not 1 <= most <= MOST_CANDIDATES:
            raise UsageError(
                f"speculate {text!r}: a pass checks from 1 to {MOST_CANDIDATES} candidates:"
                f" give {name}:1 to {name}:{MOST_CANDIDATES}"
            )
        return cls(mode, most, draft)

    def __str__(self) -> str:
        """As an engine is told."""
        return self.mode if self.most == MOST_CANDIDATES else f"{self.mode}:{self.most}"
