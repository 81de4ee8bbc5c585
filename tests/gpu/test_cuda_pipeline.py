"""The pipeline on a GPU: same logits to the last bit, same text, and nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from feeder.quantize import quantize_checkpoint
from tests import fed
from tests.checkpoints import make_checkpoint
from tests.processes import DEMO, Room, until
from tests.reference import all_logits, reference_model

TEXT = """\
001.10+002.30
0+0=0 write 0 carry 0
1+3+0=4 write 4 carry 0
1+2+0=3 write 3 carry 0
0+0+0=0 write 0 carry 0
0+0+0=0 write 0 carry 0
0003.40
\\boxed{3.4}
"""


@pytest.fixture(scope="module")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("demo") / "store"
    quantize_checkpoint(DEMO, store, "cuda", progress=False)
    return store


def device_free_bytes() -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@pytest.mark.parametrize("strategy", ["ring", "resident"])
@pytest.mark.parametrize("cache", ["1", "2", "7", "-1"])
def test_logits_in_bfloat16_are_those_of_the_plain_model(
    room: Room, tmp_path: Path, cache: str, strategy: str
) -> None:
    tied = cache == "2"
    checkpoint = make_checkpoint(tmp_path / "model", hidden=120, heads=6, kv_heads=2, tied=tied)
    quantize_checkpoint(checkpoint, tmp_path / "store", "cuda", progress=False)
    flags = (f"--cache={cache}", f"--strategy={strategy}", "--device=cuda", "--dtype=bfloat16")
    with fed.model(room, tmp_path / "store", *flags) as (model, engine):
        assert engine.memory.identity.startswith("cuda:")
        # After the engine's model, which turns cuDNN's attention off for the process.
        reference = reference_model(checkpoint, torch.bfloat16, "cuda")
        found, expected = all_logits(model), all_logits(reference)
        for ours, theirs in zip(found, expected, strict=True):
            assert theirs.isfinite().all() and theirs.std() > 0.01
            assert torch.equal(ours, theirs), (ours - theirs).abs().max()


@pytest.mark.parametrize("cache", ["128", "5", "1"])
def test_the_demo_runs(room: Room, demo_store: Path, cache: str) -> None:
    run = room.launch("--model", demo_store, "--device=cuda", f"--cache={cache}", "--json").wait()
    assert run.code == 0, run.err
    assert run.out == TEXT
    summary = json.loads(next(line for line in run.err.splitlines() if line.startswith("{")))
    assert summary["device"].startswith("cuda:")
    assert summary["dtype"] == "bfloat16"
    assert summary["feeder_peak_bytes"] > 0 and summary["engine_peak_bytes"] > 0


@pytest.mark.parametrize("victim", ["feeder", "engine"])
def test_a_killed_process_leaves_no_device_memory(
    room: Room, demo_store: Path, victim: str
) -> None:
    before = device_free_bytes()
    launcher = room.launch("--model", demo_store, "--device=cuda", "--cache=1")
    launcher.until(lambda: launcher.out, "generates")
    pid = launcher.child(victim)
    time.sleep(0.2)
    torch.cuda.synchronize()
    os.kill(pid, signal.SIGKILL)
    run = launcher.wait()
    assert run.code == 1
    assert run.last_line == f"error: the {victim} was killed by SIGKILL"
    room.settle()
    until(lambda: device_free_bytes() >= before, lambda: f"{before - device_free_bytes()} missing")
