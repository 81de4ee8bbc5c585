"""A process's events for a trace, in the format of Chrome's and Perfetto's viewers. No torch.

Collects events and hands them to the file in batches, from its owner's own thread, so small that no
loop is held up. All times are nanoseconds of ``now``, which is one clock for all processes.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.log import log
from common.trace_file import TraceFile

BATCH = 128  # events at once: encoding them takes a few hundred microseconds
INTERVAL_S = 0.5  # how long an event may wait for others
_MOST_WAITING = 100_000  # while another process has the file; more are dropped, and counted

Args = dict[str, Any]  # of an event: flat; texts, bools and finite numbers

now = time.monotonic_ns  # CLOCK_MONOTONIC


class Tracer:
    """One process of a trace. Any thread may add events.

    ``process``: its name; ``rows``: names of its rows, in the order in which they are shown;
    ``place``: where it is shown among the processes.
    """

    def __init__(self, path: str | Path, process: str, rows: Sequence[str], place: int) -> None:
        """UsageError if the file is not one that this process may write to."""
        self._file: TraceFile | None = TraceFile(path)
        self._pid = os.getpid()
        self._row_ids = {row: number for number, row in enumerate(rows, 1)}
        self._waiting: deque[tuple[str, str, str, int, int, Args]] = deque()
        self._writing = threading.Lock()
        self._written_at = time.monotonic()
        self._fills = 0
        self._dropped = 0
        self._unsaid = self._metadata(process, place)  # goes out before the first event

    # Events ------------------------------------------------------------------------------------

    def span(self, row: str, name: str, start_ns: int, end_ns: int, args: Args) -> None:
        """Something that took time. Spans of one row must be in each other or apart."""
        self._add(("X", row, name, start_ns, end_ns, args))

    def instant(self, row: str, name: str, at_ns: int, args: Args) -> None:
        """Something that happened."""
        self._add(("i", row, name, at_ns, 0, args))

    def overlapping(self, name: str, start_ns: int, end_ns: int, args: Args) -> None:
        """A span that may overlap others of its name: shown in as many lines as that takes."""
        self._fills += 1
        self._add(("b", "", name, start_ns, self._fills, args))
        self._add(("e", "", name, end_ns, self._fills, {}))

    def counter(self, name: str, at_ns: int, values: Args) -> None:
        """Figures that hold from now on."""
        self._add(("C", "", name, at_ns, 0, values))

    # Writing -----------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether events wait to be written."""
        return bool(self._waiting)

    def flush_if_due(self) -> None:
        """To be called now and then, so that events reach the file also when few come."""
        if self._waiting and time.monotonic() - self._written_at >= INTERVAL_S:
            self._flush(0.0)

    def close(self) -> None:
        """Write what is left, and leave the file."""
        while self._waiting and self._file is not None:
            if not self._flush(1.0):
                log.warning("the trace is not complete: another process keeps its file locked")
                break
        if self._file is not None:
            self._file.close()
            self._file = None

    def _add(self, event: tuple[str, str, str, int, int, Args]) -> None:
        self._waiting.append(event)
        if len(self._waiting) % BATCH == 0:
            self._flush(0.0)

    def _flush(self, patience_s: float) -> bool:
        """Write a batch, unless another thread or process is at it; whether that was done."""
        if not self._writing.acquire(blocking=patience_s > 0):
            return False
        file = self._file
        try:
            if file is None:
                self._waiting.clear()
                return True
            self._written_at = time.monotonic()
            events = [self._waiting[i] for i in range(min(2 * BATCH, len(self._waiting)))]
            if not file.append(self._encoded(events), patience_s):
                self._drop_old()
                return False
            for _ in events:
                self._waiting.popleft()
            self._unsaid = b""
            return True
        except OSError as error:
            log.warning("the trace ends here, its file cannot be written: %s", error.strerror)
            if file is not None:
                file.close()
            self._file = None
            self._waiting.clear()
            return True
        finally:
            self._writing.release()

    def _drop_old(self) -> None:
        while len(self._waiting) > _MOST_WAITING:
            self._waiting.popleft()
            self._dropped += 1

    # Encoding ----------------------------------------------------------------------------------

    def _encoded(self, events: list[tuple[str, str, str, int, int, Args]]) -> bytes:
        lines = [self._line(*event) for event in events]
        if self._dropped:
            lines.append(self._line("i", "", "dropped", now(), 0, {"events": self._dropped}))
            self._dropped = 0
        return self._unsaid + "".join(lines).encode()

    def _line(self, kind: str, row: str, name: str, at_ns: int, other: int, args: Args) -> str:
        # By hand, since the general encoder takes much longer.
        row_id = self._row_ids.get(row, 0)
        text = (
            f'{{"ph":"{kind}","pid":{self._pid},"tid":{row_id},"ts":{_us(at_ns)}'
            f',"name":{_quoted(name)}'
        )
        if kind == "X":
            text += f',"dur":{_us(max(0, other - at_ns))}'
        elif kind == "i":
            text += ',"s":"t"'
        elif kind in ("b", "e"):
            text += f',"cat":{_quoted(name)},"id2":{{"local":"{other:#x}"}}'
        if args:
            pairs = [f"{_quoted(key)}:{_plain(value)}" for key, value in args.items()]
            text += f',"args":{{{",".join(pairs)}}}'
        return text + "},\n"

    def _metadata(self, process: str, place: int) -> bytes:
        events: list[tuple[str, int, Args]] = [
            ("process_name", 0, {"name": process}),
            ("process_sort_index", 0, {"sort_index": place}),
        ]
        for row, number in self._row_ids.items():
            events.append(("thread_name", number, {"name": f"{process}: {row}"}))
            events.append(("thread_sort_index", number, {"sort_index": number}))
        return b"".join(
            json.dumps(
                {"ph": "M", "pid": self._pid, "tid": number, "name": name, "args": args}
            ).encode()
            + b",\n"
            for name, number, args in events
        )


@lru_cache(maxsize=4096)
def _quoted(text: str) -> str:
    return json.dumps(text)


def _plain(value: object) -> str:
    if type(value) is str:
        return _quoted(value)
    return repr(value) if type(value) in (int, float) else json.dumps(value)


def _us(time_ns: int) -> str:
    """Microseconds with three places, exactly: a float would not hold them."""
    return f"{time_ns // 1000}.{time_ns % 1000:03d}"
