"""Draws a part of a trace as an SVG, for documents: the rows of both processes over the same time.

python -m bench.trace_picture FILE PICTURE [--token N] [--ms 20]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

from bench.trace_read import Span, Trace, load_or_exit

WIDTH, LEFT, RIGHT, HEIGHT, GAP = 960, 150, 10, 22, 10
COLOURS = {
    "q_proj": "#4e79a7", "k_proj": "#a0cbe8", "v_proj": "#59a14f", "o_proj": "#8cd17d",
    "gate_proj": "#b6992d", "up_proj": "#f1ce63", "down_proj": "#e8a76b", "lm_head": "#9d7660",
    "wait": "#e15759", "token": "#bab0ac", "pass": "#d7cfcb", "prefill": "#d7cfcb",
}  # fmt: skip
SLOTS = {"in use": "#59a14f", "ready": "#8cd17d", "filling": "#f1ce63", "free": "#eeeeee"}
STYLE = """<style>
text { font: 12px system-ui, sans-serif; fill: #222 } .label { text-anchor: end }
.inside { font-size: 10px } .tick { fill: #666; text-anchor: middle } rect { stroke: #fff; stroke-width: .4 }
</style>"""


class Picture:
    """From ``start``, for ``length`` microseconds."""

    def __init__(self, trace: Trace, start: float, length: float) -> None:
        self._trace, self._start, self._end = trace, start, start + length
        self._scale = (WIDTH - LEFT - RIGHT) / length
        self._y = 26.0
        self._parts: list[str] = []

    def svg(self) -> str:
        trace = self._trace
        for row in ("feeder: link", "feeder: dequantize"):
            if trace.spans[row]:
                self._row(row, self._seen(trace.spans[row]))
        self._fills()
        self._slots()
        uses = self._seen(trace.spans["engine: weights"])
        self._row("engine: weights", [span for span in uses if span.name != "wait"])
        self._y -= GAP
        self._row("and waits in them", [span for span in uses if span.name == "wait"])
        tokens = self._seen(trace.spans["engine: tokens"])
        self._row("engine: tokens", [span for span in tokens if span.name == "token"])
        self._y -= GAP
        self._row("and passes in them", [span for span in tokens if span.name != "token"])
        axis, legend = list(self._axis()), list(self._legend())
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self._y:.0f}"'
            f' role="img"><title>A part of a trace</title>{STYLE}'
            '<rect width="100%" height="100%" fill="#fff"/>'
        )
        return "\n".join([head, *axis, *self._parts, *legend, "</svg>"]) + "\n"

    def _seen(self, spans: list[Span]) -> list[Span]:
        return [span for span in spans if span.end > self._start and span.start < self._end]

    def _row(self, title: str, spans: list[Span]) -> None:
        self._label(title, HEIGHT)
        for span in spans:
            kind = span.name.rpartition(".")[2]
            text = kind if kind not in ("wait", "token") else ""
            if kind == "token":
                text = f"token {span.args['number']}"
            weight = span.args.get("weight", span.name)
            self._box(span.start, span.end, self._y, HEIGHT, COLOURS[kind], f"{weight}", text)
        self._y += HEIGHT + GAP

    def _fills(self) -> None:
        """In as many lines as overlap."""
        lines: list[float] = []
        top, height = self._y, 8
        for fill in self._seen(self._trace.fills):
            line = next((n for n, end in enumerate(lines) if end <= fill.start), len(lines))
            lines[line : line + 1] = [fill.end]
            weight = fill.args["weight"]
            colour = COLOURS[weight.rpartition(".")[2]]
            self._box(fill.start, fill.end, top + line * height, height, colour, weight)
        self._label("feeder: fills", height * len(lines))
        self._y = top + height * len(lines) + GAP

    def _slots(self) -> None:
        height = 48
        samples = self._trace.slots
        self._label("feeder: slots", height)
        for (at, counts), (until, _) in zip(samples, [*samples[1:], (self._end, {})], strict=True):
            if until <= self._start or at >= self._end:
                continue
            bottom, total = self._y + height, sum(counts.values())
            for name, colour in SLOTS.items():
                part = height * counts[name] / total
                if part:
                    bottom -= part
                    title = f"{counts[name]} slots {name}"
                    self._box(at, until, bottom, part, colour, title)
        self._y += height + GAP

    def _box(
        self,
        start: float,
        end: float,
        y: float,
        height: float,
        colour: str,
        title: str,
        text: str = "",
    ) -> None:
        left, right = self._x(start), self._x(end)
        self._parts.append(
            f'<rect x="{left:.1f}" y="{y:.1f}" width="{right - left:.1f}" height="{height:.1f}"'
            f' fill="{colour}"><title>{escape(title)}, {(end - start) / 1000:.3f} ms</title></rect>'
        )
        if right - left > 6.5 * len(text) > 0:
            self._parts.append(
                f'<text class="inside" x="{left + 3:.1f}" y="{y + 15:.1f}">{escape(text)}</text>'
            )

    def _x(self, at: float) -> float:
        return LEFT + (min(max(at, self._start), self._end) - self._start) * self._scale

    def _label(self, text: str, height: float) -> None:
        y = self._y + height / 2 + 4
        self._parts.append(f'<text class="label" x="{LEFT - 8}" y="{y:.0f}">{escape(text)}</text>')

    def _axis(self) -> Iterator[str]:
        step = (self._end - self._start) / 10
        for number in range(11):
            at = self._start + number * step
            text = f"{number * step / 1000:.0f}" + (" ms" if number == 10 else "")
            anchor = ' style="text-anchor:end"' if number == 10 else ""
            yield f'<text class="tick" x="{self._x(at):.1f}" y="16"{anchor}>{text}</text>'
            yield (
                f'<path d="M{self._x(at):.1f} 20V{self._y:.0f}" stroke="#ddd" stroke-width="1"/>'
            )

    def _legend(self) -> Iterator[str]:
        for colours in (
            dict(list(COLOURS.items())[:9]),
            {f"slots {n}": c for n, c in SLOTS.items()},
        ):
            x = float(LEFT)
            for name, colour in colours.items():
                yield f'<rect x="{x:.0f}" y="{self._y:.0f}" width="12" height="12" fill="{colour}"/>'
                yield f'<text x="{x + 16:.0f}" y="{self._y + 10:.0f}">{name}</text>'
                x += 30 + 7 * len(name)
            self._y += 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.trace_picture", description=__doc__)
    parser.add_argument("trace", metavar="FILE", help="what --trace wrote")
    parser.add_argument("picture", metavar="PICTURE", help="the SVG")
    parser.add_argument("--token", type=int, default=20, metavar="N", help="where it begins")
    parser.add_argument("--ms", type=float, default=20.0, help="how long it is")
    arguments = parser.parse_args()
    trace = load_or_exit(arguments.trace)
    tokens = [s for s in trace.spans["engine: tokens"] if s.name == "token"]
    start = next((s.start for s in tokens if s.args["number"] == arguments.token), None)
    if start is None:
        sys.exit(
            f"error: {arguments.trace} has {len(tokens)} tokens and no number {arguments.token}"
        )
    Path(arguments.picture).write_text(Picture(trace, start, 1000 * arguments.ms).svg())


if __name__ == "__main__":
    main()
