"""What a trace says in figures: how busy the link was while tokens were decoded, and what it waited for.

python -m bench.timeline FILE
"""

from __future__ import annotations

import argparse
import statistics
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from bench.trace_read import Span, Trace, inside, load_or_exit
from bench.trace_uses import uses

#: Upper bounds of the histogram's classes, in microseconds.
CLASSES = (20, 50, 100, 200, 500, 1_000, 2_000, 5_000, float("inf"))
LONGEST = 10
Gap = tuple[Span, Span]  # a copy, and the next


def kind(weight: str) -> str:
    return weight.rpartition(".")[2]


def link_part(row: str, periods: list[list[Span]]) -> Iterator[str]:
    """The share of time in which the row was busy, from the first to the last span of each period."""
    busy = sum(span.duration for spans in periods for span in spans)
    total = sum(spans[-1].end - spans[0].start for spans in periods if spans)
    size = sum(span.args["bytes"] for spans in periods for span in spans)
    if not total:
        yield f"{row}: nothing while tokens were decoded"
        return
    yield (
        f"{row}: busy {100 * busy / total:.1f} % of {total / 1000:.1f} ms of decoding,"
        f" {size / total / 1000:.2f} GB/s over all, {size / busy / 1000:.2f} GB/s while busy"
    )


def gap_part(gaps: list[Gap]) -> Iterator[str]:
    """How long the row was idle between two spans, and how much time that comes to."""
    total = sum(_length(gap) for gap in gaps) or 1.0
    yield "gaps, by length       number      ms   share of the time lost"
    below = 0.0
    for bound in CLASSES:
        here = [length for gap in gaps if below <= (length := _length(gap)) < bound]
        name = f"{below:g} to {bound:g} us" if bound < float("inf") else f"above {below:g} us"
        lost = sum(here)
        yield f"  {name:18} {len(here):8} {lost / 1000:8.2f} {100 * lost / total:6.1f} %"
        below = bound


def longest_part(trace: Trace, gaps: list[Gap]) -> Iterator[str]:
    """The longest gaps: between which copies, in what state the slots were, what the engine did."""
    yield f"the {LONGEST} longest gaps, with the slots at their beginning"
    origin = trace.link[1][0].start
    for before, after in sorted(gaps, key=_length, reverse=True)[:LONGEST]:
        at = bisect_right(trace.slots, before.end, key=lambda sample: sample[0])
        slots = trace.slots[at - 1][1] if at else {}
        state = ", ".join(f"{count} {name}" for name, count in slots.items() if count)
        yield (
            f"  {_length((before, after)) / 1000:8.3f} ms at {(before.end - origin) / 1000:10.3f}:"
            f" {before.name} -> {after.name}; {state}; engine: {_engine(trace, before.end, after.start)}"
        )


def rate_part(periods: list[list[Span]]) -> Iterator[str]:
    """Speed by kind of weight."""
    by_kind: dict[str, list[Span]] = defaultdict(list)
    for spans in periods:
        for span in spans:
            by_kind[kind(span.name)].append(span)
    yield "by kind          spans   MB each   us each    GB/s"
    for name, spans in by_kind.items():
        size, time = sum(s.args["bytes"] for s in spans), sum(s.duration for s in spans)
        each, rate = size / len(spans) / 1e6, size / max(time, 1e-3) / 1000
        yield f"  {name:12} {len(spans):7} {each:9.3f} {time / len(spans):9.1f} {rate:7.2f}"


def chain_part(trace: Trace) -> Iterator[str]:
    """A weight's way from the end of its copy to the next fill of its slot, in microseconds."""
    legs: dict[str, list[float]] = defaultdict(list)
    for moments in uses(trace):
        for (first, start), (second, end) in pairwise(moments):
            legs[f"{first} -> {second}"].append(end - start)
    yield "a weight's way, us                          number     mean   median      p95"
    for name, values in legs.items():
        values.sort()
        p95 = values[int(0.95 * (len(values) - 1))]
        yield (
            f"  {name:40} {len(values):7} {statistics.fmean(values):8.1f}"
            f" {statistics.median(values):8.1f} {p95:8.1f}"
        )


def wait_part(trace: Trace, periods: list[tuple[float, float]]) -> Iterator[str]:
    """What the engine waited for while it decoded."""
    waits = [s for s in trace.spans["engine: weights"] if s.name == "wait"]
    waits = [span for spans in inside(waits, periods) for span in spans]
    total = sum(end - start for start, end in periods) or 1.0
    lost = sum(span.duration for span in waits)
    yield f"waits: {len(waits)}, {lost / 1000:.1f} ms, {100 * lost / total:.1f} % of decoding"
    for title, key in (("kind", lambda s: kind(s.args["weight"])), ("weight", _weight)):
        sums: dict[str, list[float]] = defaultdict(list)
        for span in waits:
            sums[key(span)].append(span.duration)
        for name, values in sorted(sums.items(), key=lambda item: -sum(item[1]))[:LONGEST]:
            yield f"  {title} {name}: {len(values)} waits, {sum(values) / 1000:.2f} ms"


def report(trace: Trace) -> Iterator[str]:
    """All parts, line by line."""
    row, spans = trace.link
    decoding = trace.decoding()
    tokens = sum(1 for s in trace.spans["engine: tokens"] if s.name == "token")
    yield f"{tokens} tokens, {len(trace.fills)} fills, {len(spans)} spans on {row!r}"
    periods = inside(spans, decoding)
    gaps = [gap for found in periods for gap in pairwise(found)]
    yield from link_part(row, periods)
    if gaps:
        for part in (gap_part(gaps), longest_part(trace, gaps), rate_part(periods)):
            yield ""
            yield from part
    yield ""
    yield from chain_part(trace)
    yield ""
    yield from wait_part(trace, decoding)


def _length(gap: Gap) -> float:
    return max(0.0, gap[1].start - gap[0].end)


def _weight(span: Span) -> str:
    return str(span.args["weight"])


def _engine(trace: Trace, start: float, end: float) -> str:
    """What the engine did in that time, longest first."""
    shares: dict[str, float] = defaultdict(float)
    for span in _overlapping(trace.spans["engine: weights"], start, end):
        part = min(end, span.end) - max(start, span.start)
        if span.name == "wait":
            shares[f"waited for {_weight(span)}"] += part
            shares[_weight(span)] -= part  # the wait lies in the use of its weight
        else:
            shares[span.name] += part
    shares["between weights"] = end - start - sum(shares.values())
    order = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {part:.0f} us" for name, part in order[:3] if part >= 0.5)


def _overlapping(spans: list[Span], start: float, end: float) -> Iterator[Span]:
    # Spans of a row are in order of their start, and at most two lie in each other.
    first = max(0, bisect_right(spans, start, key=lambda span: span.start) - 3)
    for span in spans[first:]:
        if span.start >= end:
            return
        if span.end > start:
            yield span


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.timeline", description=__doc__)
    parser.add_argument("trace", metavar="FILE", help="what --trace wrote")
    try:
        for line in report(load_or_exit(parser.parse_args().trace)):
            print(line, flush=True)
    except BrokenPipeError:  # whoever read it has seen enough
        sys.stderr.close()


if __name__ == "__main__":
    main()
