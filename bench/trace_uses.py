"""Follows each weight through a trace: copy, fill, grant, use, release, and the next fill of its slot."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator

from bench.trace_read import Span, Trace

Moments = list[tuple[str, float]]


def uses(trace: Trace) -> Iterator[Moments]:
    """The moments of each fill that was granted for one use, in order; those that are known."""
    used = {
        (s.args["slot"], s.args["generation"]): s
        for s in trace.spans["engine: weights"]
        if "slot" in s.args
    }
    told = {
        (row, i.name, i.args["slot"], i.args["generation"]): i.start
        for row in ("feeder: messages", "engine: messages")
        for i in trace.instants[row]
        if "generation" in i.args
    }
    grants = _by_slot([i for i in trace.instants["feeder: messages"] if i.name == "grant"])
    work = {row: _by_name(trace.spans[f"feeder: {row}"]) for row in ("link", "dequantize")}
    for slot, fills in _by_slot(trace.fills).items():
        for fill, after in zip(fills, [*fills[1:], None], strict=True):
            granted = _first_after(grants.get(slot, []), fill.end)
            if granted is None or (after is not None and granted.start > after.start):
                continue  # it was never granted
            if granted.args["standing"]:
                continue  # it stays, and is used many times
            key = (slot, granted.args["generation"])
            use = used.get(key)
            moments = [
                ("copied", _last_end(work["link"], fill)),
                ("dequantized", _last_end(work["dequantize"], fill)),
                ("filled", fill.end),
                ("grant sent", granted.start),
                ("grant read", told.get(("engine: messages", "grant", *key))),
                ("acquired", use and use.start + use.args["acquire_us"]),
                ("used", use and use.end),
                ("release sent", told.get(("engine: messages", "release", *key))),
                ("release read", told.get(("feeder: messages", "release", *key))),
                ("refilled", after and after.start),
            ]
            yield [(name, float(at)) for name, at in moments if isinstance(at, int | float)]


def _last_end(work: dict[str, list[Span]], fill: Span) -> float | None:
    """When the last piece of work for the fill ended, which may have begun before the fill did."""
    spans = work.get(fill.args["weight"], [])
    at = bisect_right(spans, fill.end, key=lambda span: span.end)
    return spans[at - 1].end if at else None


def _first_after(spans: list[Span], at: float) -> Span | None:
    index = bisect_right(spans, at, key=lambda span: span.start)
    return spans[index] if index < len(spans) else None


def _by_slot(spans: list[Span]) -> dict[int, list[Span]]:
    found: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        found[span.args["slot"]].append(span)
    return found


def _by_name(spans: list[Span]) -> dict[str, list[Span]]:
    found: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        found[span.name].append(span)
    return found
