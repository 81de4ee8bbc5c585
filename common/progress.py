"""How far a long piece of work has come, in bytes, on stderr.

On a terminal a tqdm bar, so that a person sees it move; otherwise a plain line every few seconds,
so that a log stays readable, and none at all for work that is done sooner.
Knows nothing of the work. Thread-safe.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from common.config import format_bytes
from common.log import fields, is_json, log

LINE_INTERVAL_S = 5.0


class Progress(Protocol):
    """What `progress` gives to the work that it accompanies."""

    def update(self, size_bytes: int) -> object:
        """Another `size_bytes` are done."""


@contextmanager
def progress(total_bytes: int, label: str, enabled: bool = True) -> Iterator[Progress]:
    """Show the progress of `label` towards `total_bytes`, unless it is not `enabled`."""
    if not enabled:
        yield _Silent()
    elif sys.stderr.isatty() and not is_json():
        from tqdm import tqdm  # slow to import, and seldom needed

        with tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True) as bar:
            yield bar
    else:
        yield _Lines(total_bytes, label)


class _Silent:
    def update(self, size_bytes: int) -> None:
        pass


class _Lines:
    """Prints a line when an update comes at least `LINE_INTERVAL_S` after the last one."""

    def __init__(self, total_bytes: int, label: str) -> None:
        self._total_bytes, self._label = total_bytes, label
        self._done_bytes = 0
        self._began_s = self._printed_s = time.monotonic()
        self._lock = threading.Lock()

    def update(self, size_bytes: int) -> None:
        with self._lock:
            self._done_bytes += size_bytes
            now_s = time.monotonic()
            if now_s - self._printed_s < LINE_INTERVAL_S:
                return
            self._printed_s = now_s
            rate = self._done_bytes / (now_s - self._began_s)
            share = self._done_bytes / max(self._total_bytes, 1)
            text = (
                f"{self._label}: {share:.0%}, {format_bytes(self._done_bytes)} of "
                f"{format_bytes(self._total_bytes)}, {format_bytes(rate)}/s"
            )
            if is_json():
                more = fields(done_bytes=self._done_bytes, total_bytes=self._total_bytes)
                log.info(text, extra=more)
            else:
                print(text, file=sys.stderr, flush=True)
