"""Checkpoints become stores: what is in them, and what is copied, compared and kept apart."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common import checkpoint, int4
from common.errors import CheckpointError, StoreError
from common.families import expected_tensors
from common.store import Store
from feeder import methods
from feeder.quantize import checkpoint_fingerprint, quantize_checkpoint
from tests.checkpoints import (
    edit_config,
    edit_tensors,
    load_tensors,
    make_checkpoint,
    make_hollow_checkpoint,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "untied, grouped, sizes no multiple of 128": {},
    "tied": {"tied": True},
    "ungrouped heads": {"heads": 3, "kv_heads": 3},
    "odd numbers of elements": {"hidden": 6, "heads": 1, "kv_heads": 1, "intermediate": 7},
    "sharded": {"shard_size": "60KB"},
    "sharded and tied": {"shard_size": "60KB", "tied": True},
    "fp16": {"dtype": torch.float16},
    "fp32": {"dtype": torch.float32},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_store_holds_the_checkpoint(tmp_path: Path, options: dict[str, Any]) -> None:
    model = make_checkpoint(tmp_path / "model", **options)
    store = quantize_checkpoint(
        model, tmp_path / "store", device="cpu", progress=False, method="absmax"
    )
    tensors = load_tensors(model)
    linear, residents = expected_tensors(store.config)
    assert [entry.name for entry in store.weights] == list(linear)
    assert {entry.name for entry in store.residents} == set(residents)
    for entry in store.weights:
        codes, scales = store.read_weight(entry)
        store.check(entry, codes, scales)
        expected_codes, expected_scales = int4.quantize(tensors.pop(f"{entry.name}.weight"))
        assert codes.equal(expected_codes)
        assert scales.equal(expected_scales)
    for kept in store.residents:
        expected = tensors.pop(kept.name)
        found = store.read_resident(kept)
        store.check_resident(kept, found)
        assert found.dtype == expected.dtype == options.get("dtype", torch.bfloat16)
        assert found.equal(expected)
    assert not tensors
    assert store.tied == options.get("tied", False)
    assert store.dtype == str(options.get("dtype", torch.bfloat16)).removeprefix("torch.")
    assert store.source_fingerprint == checkpoint_fingerprint(model)
    assert store.fingerprint == Store.open(tmp_path / "store").fingerprint


def test_pieces_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_checkpoint(tmp_path / "model")
    whole = quantize_checkpoint(model, tmp_path / "whole", device="cpu", progress=False)
    monkeypatch.setattr(checkpoint, "PIECE_ELEMENTS", 3 * 128)
    pieces = quantize_checkpoint(model, tmp_path / "pieces", device="cpu", progress=False)
    assert pieces.fingerprint == whole.fingerprint


def test_order_and_sharding_of_the_files_do_not_show(tmp_path: Path) -> None:
    for name, shard_size in (("single", None), ("sharded", "60KB")):
        make_checkpoint(tmp_path / name, shard_size=shard_size)
        quantize_checkpoint(tmp_path / name, tmp_path / f"{name}-store", "cpu", progress=False)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    stores = [Store.open(tmp_path / f"{name}-store") for name in ("single", "sharded")]
    assert stores[0].fingerprint == stores[1].fingerprint
    assert stores[0].source_fingerprint != stores[1].source_fingerprint


def test_tied_checkpoint_may_carry_its_head_again(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", tied=True)
    plain = quantize_checkpoint(model, tmp_path / "plain", device="cpu", progress=False)

    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(model, add_head)
    store = quantize_checkpoint(model, tmp_path / "store", device="cpu", progress=False)
    assert store.fingerprint == plain.fingerprint


def test_old_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(model, lambda tensors: tensors.update({name: torch.ones(12)}))
    quantize_checkpoint(model, tmp_path / "store", device="cpu", progress=False)


def test_config_of_transformers_4(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", dtype=torch.float16)
    old = {
        "torch_dtype": "float16",
        "rope_theta": 1e6,
        "rope_scaling": {"type": "yarn", "factor": 4},
    }
    edit_config(model, dtype=None, rope_parameters=None, **old)
    store = quantize_checkpoint(model, tmp_path / "store", device="cpu", progress=False)
    assert store.dtype == "float16"
    assert store.config["rope_theta"] == 1e6


def test_config_without_dtype_takes_the_embeddings(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", dtype=torch.float16)
    edit_config(model, dtype=None)
    store = quantize_checkpoint(model, tmp_path / "store", device="cpu", progress=False)
    assert store.dtype == "float16"


def test_tokenizer_files_go_along_and_nothing_else(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", shard_size="60KB")
    wanted = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
    wanted |= {"special_tokens_map.json", "added_tokens.json", "chat_template.jinja"}
    for name in wanted | {"README.md", "pytorch_model.bin", "tokenizer.py"}:
        (model / name).write_text(name)
    (model / "tokenizer.model").mkdir()  # not a regular file
    quantize_checkpoint(model, tmp_path / "store", device="cpu", progress=False)
    copied = {path.name for path in (tmp_path / "store").iterdir()}
    copied -= {path.name for path in (tmp_path / "store").glob("*.safetensors")}
    assert copied == wanted | {"config.json", "generation_config.json", "store.json"}
    assert all((tmp_path / "store" / name).read_text() == name for name in wanted)


def test_linked_files_are_read_as_the_hub_cache_has_them(tmp_path: Path) -> None:
    blobs = make_checkpoint(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    store = quantize_checkpoint(snapshot, tmp_path / "store", "cpu", progress=False)
    shutil.rmtree(blobs)
    assert Store.open(tmp_path / "store").fingerprint == store.fingerprint


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "quantize_config.json",
        "quant_config.json",
    ],
)
def test_links_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    model = make_checkpoint(tmp_path / "model")
    (model / name).touch()
    (model / name).rename(tmp_path / name)
    (model / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="is a link to .*, outside the checkpoint"):
        quantize_checkpoint(model, tmp_path / "store", "cpu", progress=False)
    assert not (tmp_path / "store").exists()


def test_poll_stops_the_work_and_leaves_nothing(tmp_path: Path) -> None:
    class Enough(BaseException):
        pass

    calls = iter(range(10))

    def poll() -> None:
        if next(calls) == 5:
            raise Enough

    model = make_checkpoint(tmp_path / "model")
    with pytest.raises(Enough):
        quantize_checkpoint(model, tmp_path / "store", "cpu", progress=False, poll=poll)
    assert os.listdir(tmp_path) == ["model"]


# Fingerprints of checkpoints


def change_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: edit_config(path, rms_norm_eps=1e-5),
        lambda path: change_byte(path / "model.safetensors"),
        lambda path: change_byte(path / "generation_config.json"),
        lambda path: (path / "tokenizer.json").write_text("{}"),
    ],
)
def test_fingerprint_of_a_small_checkpoint_covers_every_byte(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    model = make_checkpoint(tmp_path / "model")
    before = checkpoint_fingerprint(model)
    assert before == checkpoint_fingerprint(shutil.copytree(model, tmp_path / "copy"))
    change(model)
    assert checkpoint_fingerprint(model) != before


def test_fingerprint_of_a_large_file_covers_its_time_and_samples(tmp_path: Path) -> None:
    model = make_hollow_checkpoint(tmp_path / "model", intermediate_size=1 << 16)
    file = model / "model.safetensors"
    assert file.stat().st_size > 500 << 20
    os.utime(file, ns=(1, 1))
    before = checkpoint_fingerprint(model)
    assert before == checkpoint_fingerprint(model)
    os.utime(file, ns=(2, 2))
    assert checkpoint_fingerprint(model) != before
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"x")
    os.utime(file, ns=(1, 1))
    assert checkpoint_fingerprint(model) != before


@pytest.mark.gpu
def test_cuda_makes_the_same_store(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", hidden=384, intermediate=1001, vocab=5000)
    stores = [
        quantize_checkpoint(model, tmp_path / device, device=device, progress=False)
        for device in ("cpu", "cuda")
    ]
    assert stores[0].fingerprint == stores[1].fingerprint


@pytest.mark.parametrize("method", methods.METHODS)
def test_the_method_is_recorded_and_is_what_quantizes(tmp_path: Path, method: str) -> None:
    model = make_checkpoint(tmp_path / "model")
    path = tmp_path / "store"
    store = quantize_checkpoint(model, path, device="cpu", progress=False, method=method)
    assert store.method == method
    tensors = load_tensors(model)
    for entry in store.weights:
        expected = int4.quantize(tensors[f"{entry.name}.weight"], methods.rule(method))
        found = store.read_weight(entry)
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_the_method_may_be_absent_and_must_be_a_word(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    quantize_checkpoint(model, tmp_path / "store", device="cpu", progress=False)
    index = tmp_path / "store" / "store.json"
    content = json.loads(index.read_text())
    assert content.pop("method") == methods.DEFAULT
    del content["files"], content["checksum"]  # as it was before it had them
    index.write_text(json.dumps(content))
    assert Store.open(tmp_path / "store").method is None
    for wrong in (7, "", "Two Words", "x" * 33, ["absmax"]):
        index.write_text(json.dumps(content | {"method": wrong}))
        with pytest.raises(StoreError, match="method is .*, expected a short word"):
            Store.open(tmp_path / "store")
