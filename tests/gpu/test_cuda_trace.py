"""Spans of device work lie where the host saw the work begin and end; a real trace has all rows."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench import timeline
from bench.trace_read import Trace, load
from common.store import Store
from common.trace import Tracer, now
from common.trace_device import DeviceSpans
from feeder.quantize import quantize_checkpoint
from tests.processes import DEMO, Room
from tests.traces import assert_fills_are_explained, assert_rows_nest, strictly

SLACK_US = 300.0  # of the device's clock against the host's


def test_device_work_on_the_hosts_clock(tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    path = tmp_path / "trace.json"
    tracer = Tracer(path, "one", ("a", "b"), place=1)
    spans = DeviceSpans(tracer, device)
    stream = torch.cuda.Stream(device)
    torch.cuda._sleep(1000)  # its first call compiles
    torch.cuda.synchronize()
    seen = []
    for number in range(20):
        begin = now()
        with torch.cuda.stream(stream):
            with spans.span(stream, "a", "sleep", {"number": number, "bytes": 1 << 20}):
                torch.cuda._sleep(2_000_000)
            with spans.span(stream, "b", "short", {"number": number}):
                torch.cuda._sleep(1000)
        stream.synchronize()
        seen.append((begin / 1000, now() / 1000))
        spans.collect()
    spans.close()
    tracer.close()
    trace = Trace(load(path))
    assert_rows_nest(trace)
    sleeps, shorts = trace.spans["one: a"], trace.spans["one: b"]
    assert [s.args["number"] for s in sleeps] == [s.args["number"] for s in shorts] == [*range(20)]
    for sleep, short, (begin_us, end_us) in zip(sleeps, shorts, seen, strict=True):
        assert begin_us - SLACK_US < sleep.start < sleep.end <= short.start + SLACK_US
        assert short.end < end_us + SLACK_US
        assert sleep.duration > 20 * short.duration
        assert sleep.args["GB/s"] > 0


@pytest.mark.parametrize("slots", ["dequantized", "packed"])
def test_a_run_with_a_trace_and_a_profile(room: Room, tmp_path: Path, slots: str) -> None:
    store, path, profile = tmp_path / "store", tmp_path / "trace.json", tmp_path / "profile.json"
    quantize_checkpoint(DEMO, store, "cuda", progress=False)
    flags = ("--model", store, "--device=cuda", "--cache=9", f"--slots={slots}")
    plain = room.launch(*flags).wait()
    ended = room.launch(*flags, f"--trace={path}", f"--profile={profile}").wait()
    assert (ended.code, ended.out) == (plain.code, plain.out), ended.err
    trace = Trace(strictly(path))
    assert_rows_nest(trace)
    assert_fills_are_explained(trace, Store.open(store), SLACK_US)
    row, copies = trace.link
    assert row == "feeder: link" and all(s.args["GB/s"] > 0 for s in copies if s.duration)
    packed = sum(entry.packed_bytes for entry in Store.open(store).weights)
    assert sum(s.args["bytes"] for s in copies) > 3 * packed
    uses = [s for s in trace.spans["engine: weights"] if s.name != "wait"]
    on_device = trace.spans["engine: GPU"]
    for use, kernel in zip(uses, on_device, strict=True):  # it is done after it was acquired
        assert kernel.name == use.name
        assert kernel.end > use.start + use.args["acquire_us"] - SLACK_US
    for before, after in pairwise(copies):
        assert before.end <= after.start
    assert any("busy" in line for line in timeline.report(trace))
    events = json.loads(profile.read_text())["traceEvents"]
    assert any(e.get("cat") == "kernel" for e in events)
