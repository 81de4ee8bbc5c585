"""Logs: one line each on stderr, with the process's name in front. Text for users goes to stdout."""

from __future__ import annotations

import logging
import sys


def setup(process: str, verbose: bool = False) -> logging.Logger:
    """The logger of this process. Lines look like ``feeder: store loaded``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{process}: %(message)s"))
    logger = logging.getLogger("weight_feeder")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    return logger


log = logging.getLogger("weight_feeder")
