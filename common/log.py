"""Logs: one line each on stderr, with the process's name in front, or as JSON. Text for users goes to
stdout."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from datetime import UTC, datetime
from typing import Any

FORMATS = ("text", "json")

log = logging.getLogger("weight_feeder")


class _State:
    """How this process writes, and what it is called."""

    json = False
    process = ""


def choose_format(name: str) -> None:
    """``text`` or ``json``, for all that this process writes on stderr from now on."""
    _State.json = name == "json"


def is_json() -> bool:
    """Whether stderr takes one JSON object a line, and nothing else."""
    return _State.json


def setup(process: str, verbose: bool = False) -> logging.Logger:
    """The logger of this process. Lines look like ``feeder: store loaded``."""
    _State.process = process
    if not sys.warnoptions:  # what libraries will change is not for users; -W default shows it
        warnings.simplefilter("ignore", FutureWarning)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if _State.json else logging.Formatter(f"{process}: %(message)s"))
    logger = logging.getLogger("weight_feeder")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    if _State.json:  # what libraries say is to be readable for programs, too
        root = logging.getLogger()
        root.handlers[:] = [handler]
        logging.captureWarnings(True)
    return logger


def report_error(text: str, exit_code: int) -> None:
    """The line that says why this process ends."""
    if _State.json:
        _write("error", text, {"exit_code": exit_code})
    else:
        print(f"error: {text}", file=sys.stderr, flush=True)


def report_warning(text: str) -> None:
    """A line for a process that has no logger yet."""
    if _State.json:
        _write("warning", text, {})
    else:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def fields(**values: Any) -> dict[str, Any]:
    """For ``log.info(…, extra=fields(tokens=3))``: what a JSON line has beside its message."""
    return {"fields": values}


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        more = dict(getattr(record, "fields", {}))
        if record.exc_info:
            more["traceback"] = self.formatException(record.exc_info)
        level = record.levelname.lower()
        return _line(level, record.getMessage(), more, record.created)


def _write(level: str, text: str, more: dict[str, Any]) -> None:
    print(_line(level, text, more, time.time()), file=sys.stderr, flush=True)


def _line(level: str, text: str, more: dict[str, Any], seconds: float) -> str:
    when = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    process = _State.process or "launch"
    said = {
        "time": when.replace("+00:00", "Z"), "level": level, "process": process,
        "pid": os.getpid(), "message": text,
    }  # fmt: skip
    return json.dumps(said | {k: v for k, v in more.items() if k not in said}, default=str)
