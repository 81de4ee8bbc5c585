"""Spans of CUDA work for a trace: when a stream really did something, on the host's clock.

Events with timing are recorded round the work and read when they have fired, so nothing waits for
them. What they measure is the time since a base event, whose moment on the host's clock is known to
within a bound; the base is renewed now and then, since the two clocks drift apart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from common.trace import Args, Tracer, now

RENEW_NS = 5_000_000_000
_PRECISION_NS = 30_000  # good enough: no more attempts
_ATTEMPTS = 20  # for the first base, each as long as an empty stream needs to fire an event
_PATIENCE_NS = 300_000  # for a new base, which is let go if it does not fire in that time


@dataclass(frozen=True)
class _Base:
    """``event`` fired at ``at_ns``, give or take ``bound_ns``."""

    event: torch.cuda.Event
    at_ns: int
    bound_ns: int


@dataclass(frozen=True)
class _Begun:
    row: str
    name: str
    args: Args
    base: _Base
    start: torch.cuda.Event
    end: torch.cuda.Event


class DeviceSpans:
    """Used by one thread. ``collect`` now and then, ``close`` when all the work is complete."""

    def __init__(self, tracer: Tracer, device: torch.device) -> None:
        self._tracer = tracer
        self._stream = torch.cuda.Stream(device)  # of its own: nothing is ever queued before a base
        self._idle: list[torch.cuda.Event] = []
        self._begun: deque[_Begun] = deque()
        self._last_end_ns: dict[str, int] = {}  # by row
        torch.cuda.synchronize(device)
        found = [self._new_base(patience_ns=1_000_000_000) for _ in range(_ATTEMPTS)]
        bases = [base for base in found if base is not None]
        self._base = min(bases, key=lambda base: base.bound_ns)
        self._renew_at_ns = now() + RENEW_NS

    @contextmanager
    def span(self, stream: Any, row: str, name: str, args: Args) -> Iterator[None]:
        """What is queued on ``stream`` inside it. Spans of one row must not overlap."""
        start = self.mark(stream)
        yield
        self.since(start, stream, row, name, args)

    def mark(self, stream: Any) -> torch.cuda.Event:
        """A moment of ``stream``, for ``since``."""
        event = self._idle.pop() if self._idle else torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def since(self, start: torch.cuda.Event, stream: Any, row: str, name: str, args: Args) -> None:
        """A span from ``start`` to what was last queued on ``stream``."""
        end = self.mark(stream)
        self._begun.append(_Begun(row, name, args, self._base, start, end))

    def collect(self) -> None:
        """Add the spans that have ended to the trace."""
        while self._begun and self._begun[0].end.query():
            self._add(self._begun.popleft())
        if now() > self._renew_at_ns:
            self._renew()

    def close(self) -> None:
        """Add the rest. All the work must be complete."""
        while self._begun:
            self._add(self._begun.popleft())

    def _add(self, begun: _Begun) -> None:
        base = begun.base
        start_ns = base.at_ns + round(1e6 * base.event.elapsed_time(begun.start))
        end_ns = base.at_ns + round(1e6 * base.event.elapsed_time(begun.end))
        self._idle += (begun.start, begun.end)
        # Rounding, and a new base, may shift a span by microseconds into the one before it.
        start_ns = max(start_ns, self._last_end_ns.get(begun.row, 0))
        end_ns = self._last_end_ns[begun.row] = max(start_ns, end_ns)
        args = begun.args
        if "bytes" in args and end_ns > start_ns:
            args = args | {"GB/s": round(args["bytes"] / (end_ns - start_ns), 2)}
        self._tracer.span(begun.row, begun.name, start_ns, end_ns, args)

    # The base ----------------------------------------------------------------------------------

    def _renew(self) -> None:
        """Take a new base if a good one can be had at once; else the old one serves a while longer."""
        base = self._new_base(_PATIENCE_NS)
        if base is not None and base.bound_ns <= max(_PRECISION_NS, 2 * self._base.bound_ns):
            self._base = base
        self._renew_at_ns = now() + (RENEW_NS if base is self._base else RENEW_NS // 10)

    def _new_base(self, patience_ns: int) -> _Base | None:
        event = torch.cuda.Event(enable_timing=True)
        before = now()
        event.record(self._stream)
        while not event.query():
            if now() - before > patience_ns:
                return None
        after = now()
        return _Base(event, (before + after) // 2, (after - before) // 2)
