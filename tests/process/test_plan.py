"""--plan, and the first lines of a feeder, on the CPU: what they say of the demo. Their figures are
those of this machine, so that only what must hold between them is checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from feeder.strategies.resident import stream_slots
from tests.processes import Room, assert_refused


def test_the_plan_of_the_demo(room: Room) -> None:
    ended = room.launch("--plan", "--cache=-1", "--device=cpu").wait()
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert len(lines) == 4, ended.out
    assert "1.65 MB packed in 57 weights; CPU: dequantizer " in lines[0]
    assert "57 weights resident (1.65 MB packed), 0 weights streamed (0 B a token)" in lines[1]
    assert lines[2].startswith("about ") and " tok/s (" in lines[2]
    assert "; the limit is " in lines[2]
    assert lines[3].startswith("beside the slots: ")
    assert "serving" not in ended.err  # nothing was served, and no engine was started
    assert "engine" not in ended.err


def test_the_plan_as_json(room: Room, demo_store: Path) -> None:
    flags = ["--plan", "--json", f"--model={demo_store}", "--strategy=resident", "--cache=12"]
    ended = room.launch(*flags, "--slots=dequantized", "--device=cpu").wait()
    assert ended.code == 0, ended.err
    plan = json.loads(ended.out)
    assert (plan["weights"], plan["slots"], plan["strategy"]) == (57, 12, "resident")
    assert (plan["packed_bytes"], plan["device"], plan["mps"]) == (1653696, "cpu", False)
    assert all(
        plan["measured"][name] > 0
        for name in ("link", "device", "matmul", "launch_s", "dequantize")
    )
    predicted = plan["predicted"]
    assert predicted["resident_weights"] + predicted["streamed_weights"] == 57
    assert predicted["resident_weights"] == 12 - stream_slots(12, 57)
    least_ms = max(predicted[part] for part in ("link_ms", "host_ms"))
    assert predicted["ms_per_token"] >= 0.98 * least_ms > 0
    assert predicted["tok_per_s"] == pytest.approx(1000 / predicted["ms_per_token"])
    assert predicted["ttft_s"]["16"] <= predicted["ttft_s"]["4096"]
    assert 0 < predicted["limit_share"] <= 1
    (warning,) = plan["warnings"]
    assert warning.startswith("everything would fit: 12.8 MB of slots for all 57 weights")


def test_every_feeder_begins_with_its_plan(room: Room, demo_store: Path) -> None:
    flags = ["--cache=12", "--slots=dequantized", "--device=cpu", "--strategy=ring"]
    feeder = room.launch("--feeder-only", f"--model={demo_store}", *flags)
    feeder.until_said("feeder: serving")
    said = [line for line in feeder.err.splitlines() if line.startswith("feeder: ")]
    planned = [line.removeprefix("feeder: plan: ") for line in said[:4]]
    assert planned[0].startswith("store, 1.65 MB packed in 57 weights; CPU: ")
    assert planned[1].startswith("ring, ")
    assert planned[2].startswith("about ")
    assert planned[3].startswith("warning: everything would fit: ")
    assert said[4].startswith("feeder: serving ")
    feeder.stop()


def test_mistakes_are_as_those_of_a_run(room: Room, demo_store: Path) -> None:
    model = f"--model={demo_store}"
    assert_refused(room.launch("--plan", "--model=/no/such").wait(), "is no directory", code=2)
    assert_refused(room.launch("--plan", model, "--cache=1kB").wait(), "the largest weight", code=1)
    assert_refused(room.launch("--plan", model, "--strategy=best").wait(), "strategy 'best'")
    assert_refused(room.launch("--plan", "--feeder-only").wait(), "not allowed with", code=2)
