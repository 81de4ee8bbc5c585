"""Random stores: real shapes, the same for the same seed, and alive when run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from common import int4
from common.families import expected_tensors
from common.shapes import SHAPES
from common.store import Store
from feeder import random_store
from feeder.random_store import make_random_store

CONFIG: dict[str, Any] = SHAPES["qwen2.5-7b"] | {
    "hidden_size": 96,
    "intermediate_size": 201,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 321,
}


@pytest.fixture(autouse=True)
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool smaller than the largest weight, as it is beside a real lm_head."""
    monkeypatch.setattr(random_store, "_POOL_BYTES", 8192)


def test_same_seed_same_store(tmp_path: Path) -> None:
    stores = [
        make_random_store(CONFIG, tmp_path / str(number), seed=seed, progress=False)
        for number, seed in enumerate([7, 7, 8])
    ]
    assert stores[0].fingerprint == stores[1].fingerprint != stores[2].fingerprint


def test_weights_differ_and_obey_the_format(tmp_path: Path) -> None:
    store = make_random_store(CONFIG, tmp_path / "store", progress=False)
    assert len({entry.codes_checksum for entry in store.weights}) == len(store.weights)
    for entry in store.weights:
        codes, scales = store.read_weight(entry)
        store.check(entry, codes, scales)
        assert scales.min() > 0
        if entry.elements % 2:
            assert int(codes[-1]) & 0x0F == 0


def test_activations_stay_finite(tmp_path: Path) -> None:
    store = make_random_store(CONFIG, tmp_path / "store", progress=False)
    model = Qwen2ForCausalLM(Qwen2Config(**store.config)).to(torch.bfloat16)
    state = {entry.name: store.read_resident(entry) for entry in store.residents}
    for entry in store.weights:
        packed = store.read_weight(entry)
        state[f"{entry.name}.weight"] = int4.dequantize(*packed, entry.shape, torch.bfloat16)
    model.load_state_dict(state)
    logits = model(torch.arange(200)[None]).logits
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10


def test_command_takes_a_config_layers_and_a_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    arguments = [str(tmp_path), str(tmp_path / "store"), "--layers", "1"]
    assert random_store.main([*arguments, "--tokenizer", str(tmp_path)]) == 0
    assert len(Store.open(tmp_path / "store").weights) == 8
    assert (tmp_path / "store" / "tokenizer.json").exists()
    assert random_store.main(["qwen9", str(tmp_path / "other")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: qwen9: no such file; expected a config.json or one of qwen2.5-")


def test_known_shapes_have_the_sizes_of_their_models() -> None:
    """Parameters as the model cards say, embedding and head included."""
    billions = {
        "qwen2.5-0.5b": 0.49, "qwen2.5-1.5b": 1.54, "qwen2.5-7b": 7.62, "qwen2.5-14b": 14.8,
        "qwen2.5-32b": 32.8, "qwen2.5-72b": 72.7, "qwen3-8b": 8.19, "qwen3-32b": 32.8,
        "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.6, "mistral-7b": 7.25,
    }  # fmt: skip
    assert billions.keys() == SHAPES.keys()
    for name, expected in billions.items():
        linear, residents = expected_tensors(SHAPES[name])
        shapes = [*linear.values(), *residents.values()]
        count = sum(torch.Size(shape).numel() for shape in shapes)
        assert count / 1e9 == pytest.approx(expected, rel=0.01)
