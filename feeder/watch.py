"""A feeder's status for people: a table, and a view that moves, with a map of the model.

Knows what a status says, and terminals. Imports no torch.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from common.config import format_bytes
from common.errors import WeightFeederError
from common.model_map import STATES, Row, rows
from common.store import Store

PLAIN_WIDTH = 100  # of what goes into a file or a pipe
_BAR = 30
#: For each state: a sign, the same in ASCII, and a colour of the terminal's.
_SIGNS = {
    "s": ("█", "#", "32"), "u": ("▓", "U", "36"), "r": ("▒", "r", "34"), "f": ("░", "f", "33"),
    "v": ("▚", "v", "35"), ".": ("·", ".", "2"), "!": ("!", "!", "31;1"),
}  # fmt: skip


@dataclass(frozen=True)
class Style:
    """How much a terminal shows. ``signs``: whether it has more than ASCII."""

    colour: bool = False
    signs: bool = False


class Screen:
    """Where a view is shown. On a terminal that is ``live`` each overwrites the one before, line by
    line, so that nothing flickers; elsewhere they follow each other, plainly."""

    def __init__(self, output: TextIO, live: bool) -> None:
        self._output = output
        self._live = live and output.isatty() and os.environ.get("TERM") != "dumb"
        self._begun = False

    @property
    def width(self) -> int:
        return shutil.get_terminal_size().columns - 1 if self._live else PLAIN_WIDTH

    @property
    def style(self) -> Style:
        try:
            "█░·".encode(self._output.encoding or "ascii")
        except (UnicodeError, LookupError):
            return Style(colour=self._coloured)
        return Style(colour=self._coloured, signs=self._live)

    @property
    def _coloured(self) -> bool:
        return self._live and not os.environ.get("NO_COLOR")

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._begun:
            self._output.write("\x1b[?25h")  # the cursor is back, below the last view
            self._output.flush()

    def show(self, lines: Iterable[str]) -> None:
        """In place of what was shown last, if this is a live terminal."""
        if not self._live:
            print("\n".join(lines), flush=True, file=self._output)
            return
        height = shutil.get_terminal_size().lines
        shown = "".join(f"{line}\x1b[K\n" for line in list(lines)[: height - 1])
        start = "\x1b[H" if self._begun else "\x1b[2J\x1b[H\x1b[?25l"
        self._begun = True
        self._output.write(f"{start}{shown}\x1b[J")
        self._output.flush()


def view(fields: dict[str, Any], before: dict[str, Any], width: int, style: Style) -> list[str]:
    """The table, what has moved since ``before`` (empty, or with the moment as ``asked_s``), the map."""
    lines = [line[:width] for line in table(fields)]
    bar = max(5, min(_BAR, width - 30))
    lines.append(f"{'link use':9} {_link(fields, bar, style)}"[:width])
    lines.append(f"{'moving':9} {_moving(fields, before)}"[:width])
    states = str(fields.get("weight_states", ""))
    if states:
        lines += ["", *_map(_rows(str(fields["store"]), len(states)), states, width, style), ""]
        lines += _legend(states, width, style)
    return lines


def _link(fields: dict[str, Any], length: int, style: Style) -> str:
    now, limit = fields["link_bytes_per_s"], fields.get("link_limit_bytes_per_s", 0.0)
    if not limit:
        return f"{now / 1e9:.2f} GB/s; its limit was not measured"
    share = min(1.0, now / limit)
    full, empty = ("█", "░") if style.signs else ("#", "-")
    bar = full * round(share * length) + empty * (length - round(share * length))
    return f"{bar} {100 * share:3.0f} % of {limit / 1e9:.1f} GB/s"


def _moving(fields: dict[str, Any], before: dict[str, Any]) -> str:
    """Rates since the last look."""
    seconds = time.monotonic() - before["asked_s"] if "asked_s" in before else 0.0
    names = ("engine_uses", "engine_stall_s")
    if seconds <= 0 or not all(name in fields and name in before for name in names):
        return "no engine to compare with" if seconds else "…"
    uses, stall_s = (max(0, fields[name] - before[name]) for name in names)
    passes = uses / max(1, fields["weights"]) / seconds
    stalled = min(1.0, stall_s / seconds)
    return f"{passes:.2f} passes over the model a second, stalled {100 * stalled:.0f} %"


@cache
def _rows(store: str, count: int) -> list[Row]:
    """The map of a store's weights; one row if the store cannot be read from here."""
    try:
        names = [entry.name for entry in Store.open(Path(store)).weights]
    except (WeightFeederError, OSError):
        names = []
    if len(names) != count:
        return [Row("weights", tuple(range(count)))]
    return rows(names)


def _map(model: Sequence[Row], states: str, width: int, style: Style) -> list[str]:
    """Layers from left to right; where they are more than fit, in several bands."""
    edge = max(len(row.label) for row in model) + 1
    room = max(8, width - edge)
    longest = max(len(row.weights) for row in model)
    lines = []
    for start in range(0, longest, room):
        if longest > room:
            lines.append(f"{'':{edge}}from layer {start}")
        for row in model:
            part = row.weights[start : start + room]
            if part:
                cells = (" " if weight is None else states[weight] for weight in part)
                lines.append(f"{row.label:{edge}}{_painted(cells, style)}")
    return lines


def _painted(cells: Iterable[str], style: Style) -> str:
    text, colour = "", ""
    for cell in cells:
        sign, plain, code = _SIGNS.get(cell, (cell, cell, "0"))
        if style.colour and code != colour:
            text += f"\x1b[0;{code}m"
            colour = code
        text += sign if style.signs else plain
    return f"{text}\x1b[0m" if colour else text


def _legend(states: str, width: int, style: Style) -> list[str]:
    """As many to a line as fit."""
    lines, room = [""], width
    for state, name in STATES.items():
        text = f" {name} {states.count(state)}  "
        if len(text) + 1 > room:
            lines.append("")
            room = width
        lines[-1] += _painted(state, style) + text
        room -= len(text) + 1
    return lines


def _copies(fields: dict[str, Any]) -> str:
    if not fields.get("copies"):
        return ""
    return f"; {fields['copies']} packed copies, {format_bytes(fields['copies_bytes'])}"


def table(fields: dict[str, Any]) -> list[str]:
    """The status as lines for people."""
    engine = "none"
    if fields.get("engine_pid"):
        engine = f"pid {fields['engine_pid']}"
        if "engine_uses" in fields:
            engine += (
                f", {fields['engine_uses']} uses, {fields['engine_waits']} waits,"
                f" stalled {fields['engine_stall_s']:.1f} s"
            )
        else:
            engine += ", does not answer (stopped?)"
    states = ("filling", "ready", "in_use", "revoked")
    slots = ", ".join(f"{fields[f'slots_{s}']} {s.replace('_', ' ')}" for s in states)
    rows = {
        "feeder": f"pid {fields['pid']}, {fields['dtype']} on {fields['device']}",
        "store": f"{fields['store']} ({fields['weights']} weights,"
        f" {format_bytes(fields['packed_bytes'])}, {fields['fingerprint']})",
        "strategy": f"{fields['strategy']}, cache {fields['cache']}: {fields.get('room', '')}",
        "slots": f"{slots}; {fields['standing']} standing{_copies(fields)}",
        "hit rate": f"{100 * fields['hit_rate']:.1f} % in the last pass of {fields['passes']}",
        "link": f"{fields['link_bytes_per_s'] / 1e9:.2f} GB/s now,"
        f" {format_bytes(fields['streamed_bytes'])} in {fields['fills']} fills",
        "engine": engine,
    }
    if fields.get("draft"):
        rows["draft"] = f"{fields['draft']}, {format_bytes(fields['draft_bytes'])} of slots"
    if "quality" in fields:
        rows["quality"] = f"{fields.get('method', 'a method unknown')}: {fields['quality']}"
    return [f"{name:9} {text}" for name, text in rows.items()]
