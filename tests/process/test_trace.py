"""--trace and --profile as a user meets them: real runs, and what their files say is what happened."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import timeline
from bench.trace_read import Trace, load
from common import protocol as p
from common.store import Store
from feeder.strategies.resident import stream_slots
from tests import lives
from tests.process.test_launch import DEMO_TEXT, summary_of
from tests.processes import Room, assert_refused, until
from tests.traces import (
    US,
    assert_fills_are_explained,
    assert_rows_nest,
    pids,
    said,
    strictly,
    weights_of,
)


@pytest.mark.parametrize("slots", ["dequantized", "packed"])
def test_the_demo_with_a_trace(room: Room, demo_store: Path, tmp_path: Path, slots: str) -> None:
    path = tmp_path / "trace.json"
    flags = ("--model", demo_store, "--cache=9", f"--slots={slots}", "--json")
    flags += ("--speculate=off",)  # a pass for each token
    ended = room.launch(*flags, f"--trace={path}").wait()
    assert (ended.code, ended.out) == (0, DEMO_TEXT), ended.err
    summary, events = summary_of(ended), strictly(path)
    trace, store = Trace(events), Store.open(demo_store)
    assert {role: len(found) for role, found in pids(events).items()} == {"feeder": 1, "engine": 1}
    assert {e["pid"] for e in events} == {0}.union(*pids(events).values())
    assert_rows_nest(trace)
    assert_fills_are_explained(trace, store)

    # Tokens and passes are those of the summary, and every pass used every weight once.
    tokens = [s for s in trace.spans["engine: tokens"] if s.name == "token"]
    passes = [s for s in trace.spans["engine: tokens"] if s.name in ("prefill", "pass")]
    assert [s.args["number"] for s in tokens] == list(range(summary["tokens"]))
    assert len(passes) == len(tokens)
    assert [s.name for s in passes][:2] == ["prefill", "pass"] and passes[0].args["tokens"] > 1
    uses = [s for s in trace.spans["engine: weights"] if s.name != "wait"]
    names = [entry.name for entry in store.weights]
    assert sorted(s.name for s in uses) == sorted(names * len(passes))
    for use in uses:
        assert any(s.start <= use.start and use.end <= s.end for s in passes)

    # The waits are the stall of the summary: measured by other calls, round the same code.
    waits = [s for s in trace.spans["engine: weights"] if s.name == "wait"]
    waited_us, stall_us = (
        sum(s.duration for s in waits), 1e6 * summary["stall_share"] * summary["seconds"]
    )  # fmt: skip
    assert 0.99 * stall_us - 1000 <= waited_us <= 1.3 * stall_us + 20_000
    assert waits and {s.args["weight"] for s in waits} <= set(names)

    # What one process sent, the other read later: the clocks are one.
    granted, read = said(trace, "feeder", "grant"), said(trace, "engine", "grant")
    released, taken_back = said(trace, "engine", "release"), said(trace, "feeder", "release")
    assert len(granted) >= len(read) > 1000 and len(released) >= len(taken_back) > 1000
    assert all(granted[key] < at for key, at in read.items())
    assert all(released[key] < at for key, at in taken_back.items())
    for use in uses:
        key = (use.args["slot"], use.args["generation"])
        assert read[key] < use.start + use.args["acquire_us"] < use.end
        assert (
            key not in released or use.end <= released[key] + US
        )  # a standing grant has no release

    streamed = sum(s.args["bytes"] for s in trace.link[1])
    assert streamed >= summary["streamed_bytes"] > 0.9 * streamed * (1 - 2 / summary["tokens"])
    for _, counts in trace.slots:
        assert sum(counts.values()) == 9 and min(counts.values()) >= 0


def test_the_text_and_the_figures_of_timeline(room: Room, demo_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    flags = ("--model", demo_store, "--cache=12", "--slots=dequantized", "--strategy=resident")
    flags += ("--speculate=off",)
    ended = room.launch(*flags, f"--trace={path}").wait()
    assert (ended.code, ended.out) == (0, DEMO_TEXT), ended.err
    trace = Trace(strictly(path))
    shown = room.start("-m", "bench.timeline", path).wait()
    assert shown.code == 0, shown.err
    assert shown.out.splitlines() == list(timeline.report(trace))
    picture = tmp_path / "picture.svg"
    drawn = room.start("-m", "bench.trace_picture", path, picture, "--token=3").wait()
    assert drawn.code == 0, drawn.err
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    for command in (
        ["bench.timeline", picture],
        ["bench.trace_picture", path, picture, "--token=999"],
    ):
        assert_refused(room.start("-m", *command).wait(), "error: ", code=1)
    busy = re.search(
        r"^feeder: dequantize: busy ([\d.]+) % of ([\d.]+) ms of decoding", shown.out, re.M
    )
    assert busy is not None and 0 < float(busy[1]) <= 100 and float(busy[2]) > 0
    kinds = re.findall(r"^  (\w+) +\d+ +[\d.]+ +[\d.]+ +[\d.]+$", shown.out, re.M)
    assert set(kinds) <= {n.rpartition(".")[2] for n in weights_of(demo_store)} and len(kinds) > 2
    for leg in ("dequantized -> filled", "grant sent -> grant read", "release read -> refilled"):
        found = re.search(rf"^  {leg} +(\d+) +([\d.-]+)", shown.out, re.M)
        assert found is not None and int(found[1]) > 100
    standing = [i for i in trace.instants["feeder: messages"] if i.args.get("standing")]
    assert len(standing) == 12 - stream_slots(12, 57)  # less those through which the rest cycles


def test_two_terminals_a_swap_and_a_killed_feeder(
    room: Room, long_store: Path, long_text: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    feeder = room.feeder(*lives.feeder_flags(long_store, 9), f"--trace={path}")
    engine = room.engine(*lives.engine_flags(300), f"--trace={path}")
    lives.until_generating(engine)
    assert isinstance(lives.ask(room, p.Swap("resident", "")), p.Done)
    until(lambda: '"swap"' in path.read_text(), lambda: "the swap is in the trace")
    feeder.signal(signal.SIGKILL)
    feeder.wait()
    assert load(path)  # what there is can be read, also now
    room.feeder(*lives.feeder_flags(long_store, 9), f"--trace={path}")
    ended = engine.wait()
    assert ended.code == 0 and ended.out.split() == long_text[:300], ended.err
    room.close()
    events = strictly(path)
    assert {role: len(found) for role, found in pids(events).items()} == {"feeder": 2, "engine": 1}
    trace = Trace(events)
    assert_rows_nest(trace)
    assert_fills_are_explained(trace, Store.open(long_store))
    swaps = [i.args for i in trace.instants["feeder: strategy"] if i.name == "swap"]
    assert swaps == [{"strategy": "resident", "cache": "9"}]
    waited = [s for s in trace.spans["engine: weights"] if s.name == "wait"]
    assert waited


@pytest.mark.parametrize("who", ["Ctrl-C", "engine", "feeder", "launcher"])
def test_whoever_ends_a_run_the_file_is_complete(
    room: Room, long_store: Path, tmp_path: Path, who: str
) -> None:
    path = tmp_path / "trace.json"
    flags = [*lives.feeder_flags(long_store, 9), *lives.engine_flags(lives.LONGEST)]
    launch = room.launch(*flags, f"--trace={path}")
    launch.until(lambda: path.exists() and path.read_text().count('"token"') > 50, "generates")
    if who == "Ctrl-C":
        launch.ctrl_c()
    else:
        os.kill(launch.pid if who == "launcher" else launch.child(who), signal.SIGKILL)
    assert launch.wait().code != 0
    room.settle()  # after a launcher that was killed, its children end by themselves
    events = strictly(path)
    found = pids(events)
    assert len(found["feeder"]) == len(found["engine"]) == 1
    for found_pids in found.values():
        assert sum(e["pid"] in found_pids and e["ph"] != "M" for e in events) > 100


def test_a_file_that_is_there_is_refused(room: Room, demo_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("[]")
    for process in (
        room.launch("--model", demo_store, f"--trace={path}"),
        room.start("-m", "feeder", "--model", demo_store, f"--trace={path}"),
        room.engine("--prompt=1", f"--trace={path}"),
        room.engine("--prompt=1", f"--profile={path}"),
    ):
        assert_refused(process.wait(), f"file {path} exists: remove it, or name another", code=2)
    assert path.read_text() == "[]"


def test_a_run_that_fails_leaves_no_trace(room: Room, demo_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    ended = room.launch("--model", demo_store, "--prompt=", f"--trace={path}", "--cache=0").wait()
    assert ended.code == 2 and not path.exists(), ended.err


def test_a_profile(room: Room, demo_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    ended = room.launch("--model", demo_store, f"--profile={path}").wait()
    assert (ended.code, ended.out) == (0, DEMO_TEXT), ended.err
    events = json.loads(path.read_text())["traceEvents"]
    steps = {e["name"] for e in events if str(e.get("name", "")).startswith("ProfilerStep")}
    assert len(steps) == 3
    products = [e for e in events if e.get("name") == "aten::linear"]
    assert len(products) == 3 * len(weights_of(demo_store))


def test_an_answer_too_short_to_profile(room: Room, demo_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    ended = room.launch("--model", demo_store, "--max-new-tokens=1", f"--profile={path}").wait()
    assert ended.code == 0 and "nothing was profiled" in ended.err, ended.err
    assert not path.exists()
