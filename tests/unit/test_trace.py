"""A trace's file: several processes, one of them killed, and files that are not ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.trace_read import Event, Trace, load
from common.errors import UsageError
from common.trace import BATCH, Tracer, now
from common.trace_file import HEAD, TraceFile
from tests.processes import ROOT, until

#: Appends numbered spans until it is told to stop; with a count, only so many, and says so.
WRITER = """
import sys, time
from common.trace import Tracer, now
tracer = Tracer(sys.argv[1], sys.argv[2], ("work", "other"), place=1)
print("open", flush=True)
number = 0
while number != int(sys.argv[3]):
    start = now()
    tracer.span("work", f"span {number} \\n\\"{{", start, now(), {"number": number, "in": "]}"})
    number += 1
print("written", flush=True)
sys.stdin.read()
tracer.close()
"""

#: Stands still in the middle of an append.
STOPPED = """
import sys
from common import trace_file
file = trace_file.TraceFile(sys.argv[1])
assert file._lock(trace_file._APPENDING, 1)
print("locked", flush=True)
sys.stdin.read()
"""


class Writer:
    """A process that writes to the trace. ``count`` -1: without end."""

    def __init__(self, path: Path, name: str, count: int) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), name, str(count)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def until_said(self, text: str) -> None:
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line == f"{text}\n", self.popen.communicate()

    def end(self) -> None:
        _, err = self.popen.communicate("", timeout=60)
        assert (self.popen.returncode, err) == (0, "")

    def kill(self) -> None:
        self.popen.kill()
        self.popen.communicate()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    writers: list[Writer] = []

    def start(name: str, count: int) -> Writer:
        writer = Writer(tmp_path / "trace.json", name, count)
        writers.append(writer)
        writer.until_said("open")
        return writer

    yield start
    for writer in writers:
        writer.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.json"


def numbers(events: list[Event], pid: int) -> list[int]:
    return [e["args"]["number"] for e in events if e["ph"] == "X" and e["pid"] == pid]


def strictly(path: Path) -> list[Event]:
    events = json.loads(path.read_text(encoding="utf-8"))
    assert events == load(path)
    return events


def test_two_processes_write_at_once_and_the_last_to_leave_completes_the_array(
    start, path: Path
) -> None:
    first, second = start("one", 3000), start("two", 4001)
    first.until_said("written")
    second.until_said("written")
    first.end()
    with pytest.raises(ValueError, match=r"line \d+"):
        json.loads(path.read_text(encoding="utf-8"))
    assert numbers(load(path), first.popen.pid) == list(range(3000))
    second.end()
    events = strictly(path)
    assert numbers(events, first.popen.pid) == list(range(3000))
    assert numbers(events, second.popen.pid) == list(range(4001))
    spans = [e for e in events if e["ph"] == "X"]
    assert spans[0]["name"] == 'span 0 \n"{'
    assert all(e["dur"] >= 0 and e["args"]["in"] == "]}" for e in spans)
    named = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert named == {"one: work", "one: other", "two: work", "two: other"}
    # Each wrote while the other did: neither's events are all before the other's.
    pids = [e["pid"] for e in spans]
    assert pids != sorted(pids) and pids != sorted(pids, reverse=True)


def test_a_killed_process_leaves_a_file_that_loads_and_others_go_on(start, path: Path) -> None:
    survivor, victim = start("survivor", 2000), start("victim", -1)
    until(lambda: path.stat().st_size > 1_000_000, lambda: "grows")
    victim.kill()
    survivor.until_said("written")
    lost = numbers(load(path), victim.popen.pid)
    assert lost == list(range(len(lost))) and len(lost) > BATCH
    third = start("third", 500)
    third.until_said("written")
    third.end()
    survivor.end()
    events = strictly(path)
    assert numbers(events, survivor.popen.pid) == list(range(2000))
    assert numbers(events, third.popen.pid) == list(range(500))
    assert numbers(events, victim.popen.pid) == lost


@pytest.mark.parametrize(
    "torn",
    [
        b'{"ph":"X","pid":1,"ti',
        b'{"ph":"X","args":{"a":1}',
        b'{"ph":"X","args":{}}',
        b"{",
        b"]",
        b"\n]",
    ],
)
def test_what_a_write_that_was_cut_off_left_is_removed(start, path: Path, torn: bytes) -> None:
    writer = start("one", 700)
    writer.until_said("written")
    before = len(numbers(load(path), writer.popen.pid))
    with path.open("ab") as file:
        file.write(torn)
    assert len(numbers(load(path), writer.popen.pid)) == before > 0
    writer.end()
    assert numbers(strictly(path), writer.popen.pid) == list(range(700))


def test_a_file_that_is_complete_is_opened_again_by_none(start, path: Path) -> None:
    writer = start("one", 10)
    writer.until_said("written")
    writer.end()
    before = path.read_bytes()
    assert before.endswith(b"}\n]\n")
    with pytest.raises(UsageError, match=f"trace file {path} exists: remove it, or name another"):
        TraceFile(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", [b"", b"[", b"someone's notes\n", b"[]", HEAD])
def test_a_foreign_file_is_refused_and_stays_as_it_is(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    with pytest.raises(UsageError, match="exists: remove it"):
        Tracer(path, "one", ("work",), place=1)
    assert path.read_bytes() == text


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written: No such file or directory"):
        TraceFile(tmp_path / "none" / "trace.json")
    with pytest.raises(UsageError, match="exists: remove it"):
        TraceFile(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="exists: remove it"):
        TraceFile(tmp_path / "link")


def test_a_trace_without_events_leaves_no_file(path: Path) -> None:
    TraceFile(path).close()
    assert not path.exists()
    Tracer(path, "one", ("work",), place=1).close()
    assert not path.exists()


def test_nobody_waits_for_a_process_that_was_stopped_while_it_wrote(path: Path) -> None:
    """It holds the file's lock. Events are kept meanwhile, and none is lost."""
    tracer = Tracer(path, "one", ("work",), place=1)
    stopped = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(path)], cwd=ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert stopped.stdout is not None and stopped.stdout.readline() == "locked\n"
    for number in range(5 * BATCH):
        at = now()
        tracer.span("work", "span", at, at, {"number": number})
    assert path.stat().st_size == len(HEAD) and tracer.waiting
    stopped.communicate("")
    tracer.close()
    assert numbers(strictly(path), os.getpid()) == list(range(5 * BATCH))


def test_times_are_kept_to_the_nanosecond(path: Path) -> None:
    tracer = Tracer(path, "one", ("a", "b"), place=7)
    start = 987_654_321_012_345_678  # thirty years
    tracer.span("b", "x", start, start + 1_000_001, {})
    tracer.overlapping("fill", start, start + 5_000, {"slot": 3})
    tracer.overlapping("fill", start + 1_000, start + 6_000, {"slot": 4})
    tracer.counter("slots", start, {"free": 2})
    tracer.close()
    text = path.read_text()
    assert '"ts":987654321012345.678' in text and '"dur":1000.001' in text
    trace = Trace(load(path))
    assert [s.name for s in trace.spans["one: b"]] == ["x"] and not trace.spans["one: a"]
    assert sorted(fill.args["slot"] for fill in trace.fills) == [3, 4]
    assert all(fill.duration == 5.0 for fill in trace.fills)
    assert trace.slots == [(pytest.approx(start / 1000), {"free": 2})]
