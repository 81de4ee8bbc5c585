"""launch.py as a user meets it: text on stdout, everything else on stderr, stores made once."""

from __future__ import annotations

import json
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import edit_config, make_checkpoint
from tests.processes import Ended, Process, Room, assert_refused, lock_holder

DEMO_TEXT = r"""001.10+002.30
0+0=0 write 0 carry 0
1+3+0=4 write 4 carry 0
1+2+0=3 write 3 carry 0
0+0+0=0 write 0 carry 0
0+0+0=0 write 0 carry 0
0003.40
\boxed{3.4}
"""
SUMMARY_LINE = re.compile(
    r"engine: \d+ tokens in [\d.]+ s: [\d.]+ tok/s, TTFT [\d.]+ s; streamed [\d.]+ kB"
    r" at [\d.]+ GB/s, stalled \d+ %; peak device memory [\d.]+ kB"
    r" \(engine 0 B, feeder [\d.]+ kB\)"
)
RECORD_FIELDS = ["input", "expected_output", "output", "tokens", "seconds", "ttft_s", "found"]


def summary_of(ended: Ended) -> dict[str, Any]:
    """The summary of --json, found plausible. The feeder may say goodbye after it."""
    lines = [line for line in ended.err.splitlines() if line.startswith("{")]
    assert len(lines) == 1, ended.err
    fields = json.loads(lines[0])
    assert fields["tokens"] >= fields["prompts"] >= 1
    assert 0 < fields["ttft_s"] <= fields["seconds"]
    assert fields["tok_per_s"] == pytest.approx(fields["tokens"] / fields["seconds"], rel=0.01)
    assert 0 < fields["ms_per_token_median"] <= 1000 * fields["seconds"]
    link = fields["streamed_bytes"] / fields["seconds"] / 1e9
    assert fields["link_gb_per_s"] == pytest.approx(link, rel=0.01, abs=0.001)
    assert 0 <= fields["stall_share"] <= 1
    assert fields["feeder_peak_bytes"] > 0
    both = fields["engine_peak_bytes"] + fields["feeder_peak_bytes"]
    assert fields["peak_bytes"] == both
    return fields


def records_of(text: str) -> list[dict[str, Any]]:
    """Answers as JSON lines, found plausible."""
    assert text.endswith("\n")
    records = [json.loads(line) for line in text.removesuffix("\n").split("\n")]
    for record in records:
        assert list(record) == RECORD_FIELDS
        assert record["tokens"] >= 1
        assert 0 < record["ttft_s"] <= record["seconds"]
    return records


def quantized(process: Process | Ended) -> bool:
    return "quantize: " in process.err


def test_the_demo(room: Room, tmp_path: Path) -> None:
    ended = room.launch("--cache=128", "--json").wait()
    assert (ended.code, ended.out) == (0, DEMO_TEXT), ended.err
    assert quantized(ended)
    summary = summary_of(ended)
    told = (summary[name] for name in ("strategy", "cache", "device", "dtype", "prompts"))
    assert [*told] == ["resident", "128", "cpu", "float32", 1]
    assert 90 < summary["tokens"] <= 107  # demo/README.md says so

    # Again, from the store that was kept, with a cache that holds few weights and a list.
    prompts = [
        {"input": "12.5+7.25=?", "expected_output": r"\boxed{19.75}"},
        {"input": "1.1+2.3=?", "expected_output": r"\boxed{3.5}"},
        {"input": "999.99+0.01=?"},
    ]
    source, output = tmp_path / "prompts.json", tmp_path / "answers.jsonl"
    source.write_text(json.dumps(prompts))
    flags = ["--cache=800KiB", "--strategy=ring", "--wait-full", "--json", f"--prompts={source}"]
    flags += ["--speculate=off", "--batch=1"]  # a pass for each token
    ended = room.launch(*flags, f"--output={output}").wait()
    assert ended.code == 0, ended.err
    assert not quantized(ended)
    records = records_of(output.read_text())
    assert [record["input"] for record in records] == [prompt["input"] for prompt in prompts]
    assert [record["found"] for record in records] == [True, False, None]
    assert records[1]["expected_output"] == r"\boxed{3.5}"
    assert records[2]["output"].endswith(r"\boxed{1000}")
    assert ended.out == "".join(record["output"] + "\n" for record in records)
    assert records[1]["output"] + "\n" == DEMO_TEXT
    summary = summary_of(ended)
    assert (summary["prompts"], summary["device"]) == (3, "cpu")
    assert summary["tokens"] == sum(record["tokens"] for record in records)
    assert summary["feeder_peak_bytes"] <= 800 << 10
    packed_bytes = 3_207_168 // 2  # every pass streams nearly all of the model
    assert summary["streamed_bytes"] > summary["tokens"] * packed_bytes * 0.8


def test_json_lines_raw_and_a_warm_start(room: Room, demo_store: Path, tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    inputs = ["7+8=?", "0.5+0.25=?", "1+1=? \u2028 \x85 =?"]  # no line ends, for JSON lines
    lines = [json.dumps({"input": text}, ensure_ascii=False) for text in inputs]
    source.write_text("\n\n".join(lines))
    flags = ["--raw", "--cache=-1", "--strategy=resident", "--wait-full", "--json"]
    flags += ["--max-new-tokens=90", "--dtype=bfloat16"]
    ended = room.launch(f"--model={demo_store}", f"--prompts={source}", *flags).wait()
    assert ended.code == 0, ended.err
    records = records_of(ended.out)  # the JSON lines have stdout to themselves
    assert [record["input"] for record in records] == inputs
    assert [record["expected_output"] for record in records] == [None] * 3
    # Without its chat template the demo model begins with the line break itself.
    assert all(record["output"].startswith("\n") for record in records[:2])
    assert all(record["tokens"] <= 90 for record in records)
    summary = summary_of(ended)
    assert (summary["strategy"], summary["cache"]) == ("resident", "-1")
    assert summary["dtype"] == "bfloat16"
    assert summary["streamed_bytes"] == 0  # all was there before the first prompt
    assert summary["stall_share"] < 0.5


def test_names_and_seeds(room: Room, small_store: Path, tmp_path: Path) -> None:
    """Two pairs run at once under two names; the same seed gives the same text in any of them."""
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"input": "5 17 300 2"}\n' * 2 + '{"input": "9"}')
    flags = [f"--model={small_store}", f"--prompts={source}", "--max-new-tokens=20"]
    flags += ["--temperature=1.5", "--top-k=100", "--top-p=0.99", "--repetition-penalty=1.1"]
    first = room.launch(*flags, "--name=a", "--seed=5", "--cache=2")
    second = room.launch(*flags, "--name=b.2", "--seed=6", "--cache=-1")
    third = room.launch(*flags, "--name=c-3", "--seed=5", "--strategy=on-demand")
    outputs = []
    for process in (first, second, third):
        ended = process.wait()
        assert ended.code == 0, ended.err
        outputs.append([record["output"] for record in records_of(ended.out)])
    assert outputs[0] == outputs[2] != outputs[1]
    assert outputs[0][0] == outputs[0][1]  # the seed counts from each prompt on
    lengths = [len(text.split()) for texts in outputs for text in texts]
    assert min(lengths) > 0 and max(lengths) == 20


def test_one_name_is_for_one_feeder(room: Room, small_store: Path) -> None:
    flags = ["--feeder-only", f"--model={small_store}", "--name=taken"]
    first = room.launch(*flags)
    first.until_said("feeder: serving")
    feeder = first.child("feeder")
    assert lock_holder(room, "feeder", "taken") == feeder
    ended = room.launch(*flags).wait()
    assert_refused(ended, f"feeder: feeder 'taken' runs already, pid {feeder}:", code=2)
    # The first one is as it was: its run directory, too.
    assert lock_holder(room, "feeder", "taken") == feeder
    assert (room.directory("taken") / "feeder.sock").exists()
    first.signal(signal.SIGTERM)
    assert_refused(first.wait(), "ended by SIGTERM", code=143)


@pytest.mark.parametrize("one", ["feeder", "engine"])
def test_one_at_a_time(room: Room, small_store: Path, one: str) -> None:
    """The launcher starts one process and prints the command of the other, which then works."""
    flags = [f"--model={small_store}", "--prompt=1 2 3", "--max-new-tokens=3", "--name=by-hand"]
    flags += ["--cache=3", "--greedy", "--attention=eager"]
    launcher = room.launch(f"--{one}-only", *flags)
    announcement = f"launch: the {'engine' if one == 'feeder' else 'feeder'}'s command: "
    launcher.until_said(announcement)
    line = next(text for text in launcher.err.splitlines() if text.startswith(announcement))
    other = room.start(*shlex.split(line.removeprefix(announcement))[1:])
    if one == "engine":
        ended = launcher.wait()
        assert ended.code == 0, ended.err
    else:
        ended = other.wait()
        assert ended.code == 0, ended.err
        assert launcher.popen.poll() is None  # a feeder outlives its engines
        launcher.ctrl_c()
        assert_refused(launcher.wait(), "ended by SIGINT", code=130)
    assert len(ended.out.split()) == 3
    lines = [line for line in ended.err.splitlines() if SUMMARY_LINE.fullmatch(line)]
    assert len(lines) == 1, ended.err


def test_a_store_is_made_once_for_each_state_of_a_checkpoint(room: Room, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    made = room.cache / "weight-feeder"
    room.environment["HOME"] = str(tmp_path)
    model = "--model=~/checkpoint"  # no shell would expand that

    def serve(*flags: str) -> bool:
        """Whether a feeder of the checkpoint had to quantize it first."""
        launcher = room.launch("--feeder-only", model, *flags)
        launcher.until_said("feeder: serving")
        return quantized(launcher.stop())

    def stores() -> set[str]:
        return {path.parent.name for path in made.glob("*/store.json")}

    assert serve()
    assert len(stores()) == 1
    assert not serve()
    edit_config(checkpoint, rms_norm_eps=1e-5)
    assert serve()
    assert len(stores()) == 2

    # --store says where; one that was made of another checkpoint is not taken for this one's.
    elsewhere = tmp_path / "deep" / "store"
    assert serve(f"--store={elsewhere}")
    assert not serve(f"--store={elsewhere}")
    assert len(stores()) == 2
    edit_config(checkpoint, rms_norm_eps=1e-4)
    ended = room.launch("--feeder-only", model, f"--store={elsewhere}").wait()
    assert_refused(ended, f"store {elsewhere} was not made from checkpoint {checkpoint}", code=2)


def test_two_that_want_the_same_store_make_it_once(room: Room, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    both = [
        room.launch("--feeder-only", f"--model={checkpoint}", f"--name={name}") for name in "ab"
    ]
    for launcher in both:
        launcher.until_said("feeder: serving")
    assert [quantized(launcher.stop()) for launcher in both].count(True) == 1
