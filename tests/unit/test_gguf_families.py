"""GGUF files of families other than Qwen2: their config, their names, and the order of rows of q and k."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from transformers import AutoTokenizer

from common import int4
from common.families import expected_tensors
from common.log import log
from feeder.checkpoints.recognize import model_config, open_source
from feeder.quantize import quantize_checkpoint
from tests.checkpoints import load_tensors, make_model
from tests.gguf_files import all_as, write_gguf
from tests.processes import DEMO

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ROPE = {"rope_type": "default", "rope_theta": 1000000.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "model_type": "llama", "rope_parameters": ROPE},
    "llama with biases": {
        **SIZES, "model_type": "llama", "rope_parameters": ROPE, "head_dim": 64, "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "llama 3": {**SIZES, "model_type": "llama", "rope_parameters": LLAMA3},
    "qwen3": {**SIZES, "model_type": "qwen3", "head_dim": 64, "rope_parameters": ROPE},
}  # fmt: skip


def llama3_factors() -> np.ndarray:
    """What the frequencies of a head of 32 columns are divided by, from their wavelengths."""
    factors = []
    for i in range(16):
        wavelength = 2 * np.pi * 500000.0 ** (2 * i / 32)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / 8 + smooth)
        longest, shortest = wavelength > 8192 / 1, wavelength < 8192 / 4
        factors.append(8.0 if longest else 1.0 if shortest else between)
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize("name", MODELS)
def test_a_store_of_the_family(tmp_path: Path, name: str) -> None:
    checkpoint = make_model(tmp_path / "model", MODELS[name])
    original = json.loads((checkpoint / "config.json").read_text())
    extra = {"rope_freqs.weight": llama3_factors()} if name == "llama 3" else {}
    architecture = MODELS[name]["model_type"]
    file = tmp_path / "x.gguf"
    write_gguf(file, checkpoint, all_as(Type.F32), architecture=architecture, extra=extra)
    store = quantize_checkpoint(file, tmp_path / "store", "cpu", progress=False, method="absmax")
    # In F32 nothing is lost, so that the original's own tensors are what it must be made of.
    values = load_tensors(checkpoint)
    for entry in store.weights:
        expected = int4.quantize(values[f"{entry.name}.weight"].float())
        found = store.read_weight(entry)
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True)), entry.name
    for kept in store.residents:
        assert store.read_resident(kept).equal(values[kept.name].float()), kept.name
    ours = model_config(file)
    assert expected_tensors(ours) == expected_tensors(original)
    for key in ("rope_parameters", "rms_norm_eps", "model_type", "architectures", *SIZES):
        assert ours[key] == original[key], key


def companions(tmp_path: Path, architecture: str, pre: str) -> list[str]:
    """The files, in `scratch`, that come along with a model whose tokenizer splits text in that way."""
    config = MODELS[architecture] | {"vocab_size": 320, "num_hidden_layers": 1}
    file, scratch = tmp_path / "x.gguf", tmp_path / "scratch"
    write_gguf(
        file, make_model(tmp_path / "model", config), all_as(Type.F16),
        architecture=architecture, tokenizer=DEMO, pre=pre, keys={"tokenizer.ggml.bos_token_id": 318},
    )  # fmt: skip
    scratch.mkdir()
    return [path.name for path in open_source(file).companions(scratch)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("llama-bpe", ["it", "'LL", "Ġ", "123", "456", "7", "ĠaBc"]),
        ("tekken", ["it", "'LL", "Ġ", *"1234567", "Ġa", "Bc"]),
        ("qwen2", ["it", "'LL", "Ġ", *"1234567", "ĠaBc"]),
    ],
)
def test_text_is_split_as_the_file_says(tmp_path: Path, pre: str, expected: list[str]) -> None:
    assert "tokenizer.json" in companions(tmp_path, "llama", pre)
    found = AutoTokenizer.from_pretrained(tmp_path / "scratch", local_files_only=True)
    split = found.backend_tokenizer.pre_tokenizer.pre_tokenize_str("it'LL 1234567 aBc")
    assert [piece for piece, _ in split] == expected
    assert (found.bos_token_id, found.eos_token_id, len(found)) == (318, 319, 320)


@pytest.mark.parametrize(
    ("architecture", "pre", "match"),
    [
        ("llama", "smollm", "tokenizer.ggml.pre is 'smollm', expected one of qwen2"),
        ("qwen3", "tekken", "'tekken', and Qwen2Tokenizer splits text otherwise"),
    ],
)
def test_a_split_that_cannot_be_had_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, architecture: str, pre: str, match: str
) -> None:
    caplog.set_level("INFO", log.name)
    assert companions(tmp_path, architecture, pre) == ["generation_config.json"]
    assert match in caplog.text and "prompts have to be token ids" in caplog.text
