"""`python -m feeder.quantize --method gptq --measure`: its store, what is said of it, and its mistakes."""

from __future__ import annotations

import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.store import Store
from demo import sums, tokenizer
from feeder import quantize
from feeder.checkpoints.recognize import open_source
from feeder.measured import measure
from feeder.texts import MEASUREMENT
from tests.checkpoints import edit_tensors, make_checkpoint, make_hollow_checkpoint
from tests.processes import Process, Room


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(
        tmp_path_factory.mktemp("calibrated") / "model", vocab=320, dtype=torch.float32
    )
    edit_tensors(path, lambda tensors: [t.mul_(4) for t in tensors.values() if t.ndim == 2])
    tokenizer.build().save_pretrained(path)
    return path


def write_sums(path: Path, seed: int) -> Path:
    drawn = (sums.draw(random.Random(seed + at), held_out=False) for at in range(60))
    lines = [json.dumps({"input": d.prompt, "expected_output": d.working}) for d in drawn]
    path.write_text("\n".join(lines))
    return path


def python(room: Room, module: str, *flags: str | Path) -> Process:
    return room.start("-m", module, *flags, "--device=cpu")


def test_a_store_that_was_calibrated_and_measured(
    room: Room, checkpoint: Path, tmp_path: Path
) -> None:
    calibration = write_sums(tmp_path / "calibration.jsonl", 1)
    text = write_sums(tmp_path / "measure.jsonl", 1000)
    path = tmp_path / "store"
    flags = ["--method=gptq", f"--calibration={calibration}", "--calibration-tokens=3000"]
    ended = python(
        room, "feeder.quantize", checkpoint, path, *flags, "--measure", f"--text={text}"
    ).wait()
    assert ended.code == 0, ended.err
    store = Store.open(path)
    quality = store.quality
    assert store.method == "gptq" and quality is not None
    assert f"quality: {quality}" in ended.err
    assert quality.text == "measure.jsonl" and quality.tokens > 2000
    assert os.listdir(tmp_path).count("store") == 1 and not list(path.glob(".*"))

    # The same figures again.
    flags = [f"--text={text}", "--json", "--tokens=16384", "--length=512", "--layers"]
    ended = python(room, "bench.quality", checkpoint, path, *flags).wait()
    assert ended.code == 0, ended.err
    [again] = json.loads(ended.out)["stores"]
    for name in ("kl_mean", "kl_p99", "perplexity", "perplexity_original", "top1_agreement"):
        assert again[name] == pytest.approx(getattr(quality, name), rel=1e-4), name
    assert len(again["layers"]) == 2

    # Nearer to the original than the default, which needs no data.
    default = quantize.quantize_checkpoint(checkpoint, tmp_path / "default", "cpu", progress=False)
    assert default.quality is None
    excerpt = replace(MEASUREMENT, path=text)
    measured = measure(
        open_source(checkpoint), default, excerpt, torch.device("cpu"), lambda: None
    ).quality
    assert measured is not None and quality.kl_mean < 0.7 * measured.kl_mean
    assert measured.perplexity_original == pytest.approx(quality.perplexity_original, rel=1e-4)

    ended = room.launch("--plan", "--json", f"--model={path}", "--device=cpu").wait()
    assert json.loads(ended.out)["quality"] == quality.as_json()


def test_a_signal_amid_calibration_leaves_nothing(room: Room, tmp_path: Path) -> None:
    model = make_hollow_checkpoint(
        tmp_path / "large", hidden_size=512, intermediate_size=8192, num_hidden_layers=8,
        vocab_size=320, max_position_embeddings=2048,
    )  # fmt: skip
    tokenizer.build().save_pretrained(model)
    process = python(room, "feeder.quantize", model, tmp_path / "store", "--method=gptq")
    process.until(lambda: list(tmp_path.glob(".store.partial-*/weights-*")), "begins a store")
    process.signal(signal.SIGINT)
    ended = process.wait()
    assert ended.code == 130 and "Traceback" not in ended.err
    assert os.listdir(tmp_path) == ["large"]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--calibration=TEXT"], 2, "--calibration is of no use to --method weighted"),
        (["--calibration-tokens=9"], 2, "--calibration-tokens is of no use to --method weighted"),
        (["--text=TEXT"], 2, "--text is what --measure measures on"),
        (["--method=gptq", "--calibration=/no/such"], 2, "No such file"),
        (["--method=gptq", "--calibration=TEXT", "--calibration-tokens=1"], 2, "at least 2"),
        (["--measure", "--text=/no/such"], 2, "No such file"),
    ],
)
def test_mistakes_come_before_the_work(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    code: int,
    message: str,
) -> None:
    text = tmp_path / "text"
    text.write_text("1.1+2.3=?")
    flags = [flag.replace("TEXT", str(text)) for flag in flags]
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        found = quantize.main([str(checkpoint), str(tmp_path / "store"), "--device=cpu", *flags])
    finally:
        signal.signal(signal.SIGINT, handlers[0])
        signal.signal(signal.SIGTERM, handlers[1])
    said = capsys.readouterr().err
    assert found == code
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said
    assert os.listdir(tmp_path) == ["text"]
