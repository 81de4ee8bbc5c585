"""Read JSON that others wrote, trusting nothing: bounded, UTF-8, finite numbers, no surprises.

Owns the one way in which this project parses JSON files. Knows nothing of what they mean:
callers turn its `ValueError` into their own error, naming the file.
"""

import json
import math
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 << 20


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse UTF-8 JSON whose top level is an object.

    Raises ValueError, in one short clause, for anything else, NaN and Infinity included.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite
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
