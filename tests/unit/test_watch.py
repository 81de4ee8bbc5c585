"""The model's map, and the view of it that a terminal shows."""

from __future__ import annotations

import io
from typing import Any

import pytest

from common.model_map import STATES, rows
from common.plan import Capacity, Plan
from feeder.scheduler import Fill, Grant, Scheduler
from feeder.status import weight_states
from feeder.strategies.registry import make_strategy
from feeder.watch import Screen, Style, view

QWEN = [
    f"model.layers.{layer}.{kind}"
    for layer in range(12)
    for kind in ("self_attn.q_proj", "mlp.up_proj")
]


def test_the_map_of_a_model() -> None:
    found = rows([*QWEN, "lm_head"])
    assert [row.label for row in found] == ["q_proj", "up_proj", "lm_head"]
    assert found[0].weights == tuple(range(0, 24, 2))  # layer 10 comes after 9, not after 1
    assert found[1].weights == tuple(range(1, 24, 2))
    assert found[2].weights == (24,)


def test_layers_that_lack_a_weight_have_gaps() -> None:
    found = rows(["h.0.a.w", "h.2.a.w", "h.2.b.w", "h.5.a.w"])
    assert [(row.label, row.weights) for row in found] == [
        ("a.w", (0, 1, 3)), ("b.w", (None, 2, None)),
    ]  # fmt: skip
    assert rows([]) == []


def test_states_follow_the_slots() -> None:
    plan = Plan(tuple(range(6)))
    scheduler = Scheduler(plan, [512] * 6, Capacity(2, 1024), make_strategy("ring"))
    assert weight_states(scheduler) == "......"
    fills = [command for command in scheduler.step() if isinstance(command, Fill)]
    assert weight_states(scheduler) == "ff...."
    for fill in fills:
        scheduler.filled(fill.slot)
    assert weight_states(scheduler) == "rr...."
    scheduler.attach()
    granted = [command for command in scheduler.step() if isinstance(command, Grant)]
    assert weight_states(scheduler) == "uu...."
    scheduler.need(4)
    assert weight_states(scheduler) == "uu..!."
    assert [grant.weight for grant in granted] == [0, 1]


def test_states_of_what_stays() -> None:
    plan = Plan(tuple(range(4)))
    scheduler = Scheduler(plan, [512] * 4, Capacity(4, 2048), make_strategy("resident"))
    scheduler.attach()
    for command in scheduler.step():
        assert isinstance(command, Fill)
        scheduler.filled(command.slot)
    scheduler.step()
    assert weight_states(scheduler) == "ssss"


def fields(**more: Any) -> dict[str, Any]:
    """A status as a feeder gives it."""
    states = {f"slots_{name}": 0 for name in ("filling", "ready", "in_use", "revoked")}
    return {
        "pid": 7, "dtype": "float32", "device": "cpu", "store": "/nowhere", "weights": 100,
        "packed_bytes": 5000, "fingerprint": "f", "strategy": "ring", "cache": "3",
        "room": "3 weights in 4 kB",
        "arena_bytes": 900, "standing": 0, "hit_rate": 0.25, "passes": 4, "streamed_bytes": 10**9,
        "fills": 9, "link_bytes_per_s": 25e9, "link_limit_bytes_per_s": 50e9, "engine_pid": 0,
        "weight_states": "s" * 60 + "u" * 3 + "." * 36 + "!",
    } | states | more  # fmt: skip


@pytest.mark.parametrize("width", [40, 79, 200])
@pytest.mark.parametrize("style", [Style(), Style(signs=True)])
def test_no_line_is_wider_than_the_screen(width: int, style: Style) -> None:
    lines = view(fields(), {}, width, style)
    assert max(len(line) for line in lines) <= width
    text = "".join(lines)
    assert text.count("U") + text.count("▓") >= 3


def test_rates_and_shares() -> None:
    lines = view(fields(), {}, 100, Style())
    (link,) = (line for line in lines if line.startswith("link use"))
    assert "#" * 15 + "-" * 15 in link and "50 % of 50.0 GB/s" in link
    unmeasured = view(fields(link_limit_bytes_per_s=0.0), {}, 100, Style())
    assert any("was not measured" in line for line in unmeasured)
    assert not any("passes over" in line for line in lines)
    # An older feeder, which says less.
    old = {name: value for name, value in fields().items() if name != "weight_states"}
    assert view(old, {}, 100, Style())
    assert len(STATES) == len(set(STATES.values()))


class Terminal(io.StringIO):
    """Says that it is one."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_live_screen_overwrites_and_gives_the_cursor_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    output = Terminal()
    with Screen(output, live=True) as screen:
        assert screen.style == Style(colour=True, signs=True)
        screen.show(["one", "two"])
        first = output.getvalue()
        screen.show(["three"])
    second = output.getvalue()[len(first) :]
    assert "\x1b[2J" in first and "\x1b[2J" not in second  # cleared once: no flicker
    assert second.startswith("\x1b[Hthree\x1b[K\n\x1b[J") and second.endswith("\x1b[?25h")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Screen(output, live=True).style.colour


def test_what_is_no_terminal_gets_plain_text() -> None:
    output = io.StringIO()
    with Screen(output, live=True) as screen:
        screen.show(["one"])
        assert screen.style == Style()
    assert output.getvalue() == "one\n"
