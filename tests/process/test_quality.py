"""bench.quality's figures are those of plain transformers models on the same text."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM

from common.store import Store
from demo import tokenizer
from feeder.quantize import quantize_checkpoint
from tests.checkpoints import edit_tensors, make_checkpoint
from tests.processes import ROOT
from tests.reference import reference_model

TEXT = "The sum of two numbers.\n\n1.1+2.3=?\nworked out digit by digit\n\n\nx\n\n" + " ".join(
    ["carry 0"] * 40
)
LENGTH = 48


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quality") / "model"
    make_checkpoint(path, vocab=320, tied=request.param, dtype=torch.float32)

    def sharpen(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            if tensor.ndim == 2:
                tensor.mul_(4)  # else all tokens are nearly equally likely

    edit_tensors(path, sharpen)
    tokenizer.build().save_pretrained(path)
    return path


def quality(*flags: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.quality", *map(str, flags), "--device=cpu"]
    return subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def measured(*flags: str | Path) -> dict[str, Any]:
    done = quality(*flags, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def directly(checkpoint: Path, texts: list[list[int]]) -> dict[str, float]:
    """The same figures from whole models and one text at a time, in float64 after the logits."""
    plain = Qwen2ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    quantized = reference_model(checkpoint, torch.float32)
    found: list[tuple[float, float, float, bool]] = []
    for text in texts:
        with torch.inference_mode():
            p, q = (
                model(torch.tensor([text])).logits[0].double().log_softmax(-1)
                for model in (plain, quantized)
            )
        for at, following in enumerate(text[1:]):
            kl = sum(
                math.exp(a) * (a - b) for a, b in zip(p[at].tolist(), q[at].tolist(), strict=True)
            )
            same = bool(p[at].argmax() == q[at].argmax())
            found.append((kl, float(p[at, following]), float(q[at, following]), same))
    kls, ps, qs, agreements = zip(*found, strict=True)
    return {
        "kl_mean": sum(kls) / len(kls),
        "kl_p99": sorted(kls)[math.ceil(0.99 * len(kls)) - 1],
        "perplexity_original": math.exp(-sum(ps) / len(ps)),
        "perplexity": math.exp(-sum(qs) / len(qs)),
        "top1_agreement": sum(agreements) / len(agreements),
    }


def cut(ids: list[int]) -> list[list[int]]:
    return [ids[first : first + LENGTH] for first in range(0, len(ids), LENGTH)]


@pytest.mark.parametrize("paragraphs", [False, True])
def test_figures_are_those_of_whole_models(
    checkpoint: Path, tmp_path: Path, paragraphs: bool
) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    quantize_checkpoint(checkpoint, tmp_path / "store", "cpu", progress=False)
    flags = ["--paragraphs"] if paragraphs else []
    result = measured(
        checkpoint, tmp_path / "store", "--text", text, f"--length={LENGTH}", "--layers", *flags
    )
    parts = [part for part in TEXT.split("\n\n") if part] if paragraphs else [TEXT]
    tokens = tokenizer.build()
    rows = [row for part in parts for row in cut(tokens(part.strip("\n"))["input_ids"])]
    rows = [row for row in rows if len(row) > 1]
    assert len(rows) > 2
    [found] = result["stores"]
    expected = directly(checkpoint, rows)
    assert expected["kl_mean"] > 1e-4 and 0.5 < expected["top1_agreement"] < 1
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3), name
    assert found["tokens"] == sum(map(len, rows)) and found["contexts"] == len(rows)
    assert found["method"] == "weighted"
    assert found["fingerprint"] == Store.open(tmp_path / "store").fingerprint
    assert len(found["layers"]) == 2
    assert all(0 < layer[key] < 1 for layer in found["layers"] for key in ("hidden", "weights"))


def test_methods_are_compared_and_written(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "quality.json"
    result = measured(checkpoint, "--methods=absmax,search", "--tokens=600", f"--output={output}")
    assert json.loads(output.read_text()) == result
    assert result["circumstances"]["command"].startswith("python -m bench.quality ")
    assert [store["method"] for store in result["stores"]] == ["absmax", "search"]
    absmax, search = result["stores"]
    assert absmax["perplexity_original"] == search["perplexity_original"]
    assert search["kl_mean"] < absmax["kl_mean"]
    assert absmax["quantize_s"] > 0 and absmax["tokens"] == 600


def test_mistakes_come_before_the_work(checkpoint: Path) -> None:
    for flags, message in (
        (["--methods=absmax,best"], "method 'best' is not known"),
        (["--methods=absmax,gptq", "--calibration=/no/such"], "/no/such cannot be read"),
    ):
        done = quality(checkpoint, *flags, "--tokens=100")
        refused(done, message)
        assert done.returncode == 2 and not done.stdout


def test_a_text_without_anything_to_predict(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("\n")
    refused(quality(checkpoint, "--text", text), "fewer than two tokens")
    text.write_bytes(b"\xff\xfe\xff")
    refused(quality(checkpoint, "--text", text), "is not UTF-8")


def test_mistakes_are_one_line(checkpoint: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", layers=1)
    quantize_checkpoint(other, tmp_path / "store", "cpu", progress=False)
    refused(quality(checkpoint, tmp_path / "store"), "is of another config")
    refused(quality(checkpoint, "--tokens=1"), "expected at least 2")
    refused(quality(other), "has no tokenizer")
    refused(quality(checkpoint, "--output=/nowhere/x.json"), "its directory does not exist")


def refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode > 0 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1 and message in errors[0]
