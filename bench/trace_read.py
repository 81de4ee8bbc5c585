"""Reads a trace back: also one that is still being written, or whose writers were killed."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Event = dict[str, Any]


def load_or_exit(path: str) -> Trace:
    """For commands: what is wrong with the file is one line."""
    try:
        return Trace(load(path))
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"error: trace {path} cannot be read: {error}")


@dataclass(frozen=True)
class Span:
    """Times are microseconds of the trace's clock."""

    name: str
    start: float
    end: float
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def duration(self) -> float:
        return self.end - self.start


def load(path: str | Path) -> list[Event]:
    """All whole events. ValueError if the file is no trace."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        events = json.loads(text)
    except ValueError:  # not complete: then it is one event a line, the last one perhaps cut off
        lines = text[: text.rfind("\n") + 1].rstrip("\n],").removeprefix("[")
        events = json.loads(f"[{lines}]")
    if not isinstance(events, list) or not all(isinstance(e, dict) and "ph" in e for e in events):
        raise ValueError(f"{path} is no trace in the JSON array format")
    return events


class Trace:
    """Spans and instants by the name of their row, such as ``feeder: link``; fills; slot counts.

    Several processes of one role (a feeder that was replaced, a second engine) share their rows.
    """

    def __init__(self, events: list[Event]) -> None:
        rows = {
            (e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"
        }
        self.spans: dict[str, list[Span]] = defaultdict(list)
        self.instants: dict[str, list[Span]] = defaultdict(list)
        self.fills: list[Span] = []
        self.slots: list[tuple[float, dict[str, int]]] = []
        begun: dict[tuple[int, str], Event] = {}
        for event in events:
            row = rows.get((event["pid"], event["tid"]), "")
            at, args, name = event.get("ts", 0.0), event.get("args", {}), event["name"]
            match event["ph"]:
                case "X":
                    self.spans[row].append(Span(name, at, at + event["dur"], args))
                case "i":
                    self.instants[row].append(Span(name, at, at, args))
                case "C":
                    self.slots.append((at, args))
                case "b":
                    begun[event["pid"], event["id2"]["local"]] = event
                case "e":
                    begin = begun.pop((event["pid"], event["id2"]["local"]), None)
                    if begin is not None:
                        self.fills.append(Span(name, begin["ts"], at, begin["args"]))
        for spans in (*self.spans.values(), *self.instants.values(), self.fills):
            spans.sort(key=lambda span: span.start)
        self.slots.sort(key=lambda sample: sample[0])

    @property
    def link(self) -> tuple[str, list[Span]]:
        """The work that crosses the link: copies, or, on a CPU, where nothing is copied, what stands
        for them."""
        for row in ("feeder: link", "feeder: dequantize"):
            if self.spans[row]:
                return row, self.spans[row]
        return "feeder: link", []

    def decoding(self) -> list[tuple[float, float]]:
        """From the end of each answer's first token to the end of its last."""
        periods: list[tuple[float, float]] = []
        for token in self.spans["engine: tokens"]:
            if token.name != "token" or token.args["number"] == 0:
                continue
            if periods and abs(periods[-1][1] - token.start) < 1:
                periods[-1] = (periods[-1][0], token.end)
            else:
                periods.append((token.start, token.end))
        return periods


def inside(spans: list[Span], periods: list[tuple[float, float]]) -> list[list[Span]]:
    """For each period the spans that lie in it."""
    return [[s for s in spans if start <= s.start and s.end <= end] for start, end in periods]
