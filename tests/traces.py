"""What tests know of traces."""

from __future__ import annotations

import json
from pathlib import Path

from bench.trace_read import Event, Span, Trace
from common.store import Store

US = 1.0  # rounding to nanoseconds, and a float's


def strictly(path: Path) -> list[Event]:
    """The events of a file that is valid to the last byte."""
    return json.loads(path.read_text(encoding="utf-8"))


def weights_of(store: Path) -> list[str]:
    return [entry.name for entry in Store.open(store).weights]


def pids(events: list[Event]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for event in events:
        if event["name"] == "process_name":
            found.setdefault(event["args"]["name"], set()).add(event["pid"])
    return found


def assert_rows_nest(trace: Trace) -> None:
    """No span of a row crosses the border of another, as the viewers demand."""
    for row, spans in trace.spans.items():
        open_spans: list[Span] = []
        for span in sorted(spans, key=lambda span: (span.start, -span.end)):
            while open_spans and open_spans[-1].end <= span.start + US / 100:
                open_spans.pop()
            if open_spans:
                assert span.end <= open_spans[-1].end + US / 100, (row, open_spans[-1], span)
            open_spans.append(span)


def assert_fills_are_explained(trace: Trace, store: Store, slack_us: float = 0.0) -> None:
    """Each fill has all of the weight's dequantization in it, or, of packed slots, all of its copy;
    and no grant comes before its fill.

    ``slack_us``: how far the device's clock may be off.
    """
    packed = {entry.name: entry.packed_bytes for entry in store.weights}
    by_weight: dict[str, list[Span]] = {}
    for span in trace.spans["feeder: dequantize"] or trace.spans["feeder: link"]:
        by_weight.setdefault(span.name, []).append(span)
    assert set(by_weight) == set(packed)
    for fill in trace.fills:
        start, end = fill.start - slack_us, fill.end + slack_us
        inside = [s for s in by_weight[fill.args["weight"]] if start <= s.start and s.end <= end]
        assert sum(s.args["bytes"] for s in inside) >= packed[fill.args["weight"]], fill
    granted = [i for i in trace.instants["feeder: messages"] if i.name == "grant"]
    assert granted
    for grant in granted:
        before = [
            f for f in trace.fills if f.args["slot"] == grant.args["slot"] and f.end <= grant.start
        ]
        assert before and before[-1].args["weight"] == grant.args["weight"], grant


def said(trace: Trace, role: str, what: str) -> dict[tuple[int, int], float]:
    """When a process sent or read the messages, by slot and generation."""
    found = [i for i in trace.instants[f"{role}: messages"] if i.name == what]
    return {(i.args["slot"], i.args["generation"]): i.start for i in found}
