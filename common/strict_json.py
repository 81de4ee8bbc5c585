"""Read JSON that others wrote, trusting nothing: bounded, UTF-8, finite numbers, each key once.

Owns the one way in which this project parses JSON files. Knows nothing of what they mean:
callers turn its `ValueError` into their own error, naming the file.
"""

import json
import math
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 << 20
MAX_DEPTH = 32  # of objects and lists in each other; a config has three
MAX_DIGITS = 32  # of an integer: more than any size or offset has


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse UTF-8 JSON whose top level is an object.

    Raises ValueError, in one short clause, for anything else: also for NaN and Infinity, for numbers
    that are too large, for a key that an object has twice, and for nesting beyond `MAX_DEPTH`.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_short,
            object_pairs_hook=_unique,
        )
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not valid JSON (line {error.lineno}, column {error.colno}: {error.msg})"
        ) from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, expected an object")
    _require_shallow(value)
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Read and parse a JSON object from a regular file of at most `MAX_JSON_BYTES`.

    Raises ValueError as `parse_object` does, and for a missing, unreadable or larger file.
    """
    try:
        if not path.is_file():  # opening a FIFO would block for ever
            raise ValueError("no such file" if not path.exists() else "not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MiB")
    return parse_object(data)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"the number {text}, which JSON does not have")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]}, which is too large")
    return value


def _short(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"the number {text[:20]}..., which is too large")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.60} twice in one object")
    return value


def _require_shallow(value: dict[str, Any]) -> None:
    """What is nested deeply would exhaust the stack of whoever walks it later."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for items in inner for child in items if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"JSON nested too deeply, expected at most {MAX_DEPTH} levels")
