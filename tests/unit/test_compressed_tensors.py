"""Checkpoints written by compressed-tensors itself become stores, against its own dequantized values."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from common import int4
from common.errors import CheckpointError
from feeder.checkpoints.awq import Awq
from feeder.checkpoints.compressed import Compressed
from feeder.quantize import quantize_checkpoint
from tests.checkpoints import edit_config
from tests.ready_made import Weight, awq, packed_across, random_weight, write


@cache
def scheme(symmetric: bool, group_size: int) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = "group" if group_size > 0 else "channel"
    size = group_size if group_size > 0 else None
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=symmetric, strategy=strategy, group_size=size
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


def settings(symmetric: bool, group_size: int) -> dict[str, Any]:
    """quantization_config, as the library writes it."""
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig(
        config_groups={"group_0": scheme(symmetric, group_size)},
        format="pack-quantized",
        ignore=["lm_head"],
        quantization_status="compressed",
    )
    return json.loads(config.model_dump_json())


class Library:
    """Encodes weights, and keeps what the library makes of them again."""

    def __init__(self, symmetric: bool, group_size: int) -> None:
        self.scheme = scheme(symmetric, group_size)
        self.values: list[torch.Tensor] = []

    def encode(self, weight: Weight) -> dict[str, torch.Tensor]:
        from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

        plain = {"weight": weight.values(), "weight_scale": weight.scales}
        plain["weight_zero_point"] = torch.from_numpy(weight.zeros - 8).to(torch.int8)
        packed = PackedQuantizationCompressor.compress(plain, self.scheme)
        found = PackedQuantizationCompressor.decompress(packed, self.scheme)["weight"]
        assert found.float().equal(weight.values().to(found.dtype).float())
        self.values.append(found)
        return packed


@pytest.mark.parametrize("group_size", [128, -1])
def test_what_fits_is_kept_bit_for_bit(tmp_path: Path, group_size: int) -> None:
    library = Library(True, group_size)
    model = tmp_path / "model"

    def make(shape: tuple[int, int], seed: int) -> Weight:
        return random_weight(shape, seed, group_size if group_size > 0 else shape[1])

    write(model, settings(True, group_size), make, library.encode)
    store = quantize_checkpoint(model, tmp_path / "store", "cpu", progress=False)
    assert store.source_format == "compressed-tensors"
    for entry, expected in zip(store.weights, library.values, strict=False):
        assert expected.dtype == torch.bfloat16
        found = int4.dequantize(*store.read_weight(entry), entry.shape, torch.bfloat16)
        assert found.equal(expected)


def test_zero_points_that_do_not_fit(tmp_path: Path) -> None:
    library = Library(False, 128)
    model = tmp_path / "model"

    def make(shape: tuple[int, int], seed: int) -> Weight:
        return random_weight(shape, seed, dtype=torch.float32, asymmetric=True)

    write(model, settings(False, 128), make, library.encode)
    store = quantize_checkpoint(model, tmp_path / "store", "cpu", False, method="absmax")
    for entry, expected in zip(store.weights, library.values, strict=False):
        codes, scales = store.read_weight(entry)
        found = int4.dequantize(codes, scales, entry.shape, torch.float32).view(-1, 128)
        again = int4.dequantize(*int4.quantize(expected), entry.shape, torch.float32).view(-1, 128)
        blocks = expected.view(-1, 128)
        near = ((found - blocks).abs() <= blocks.abs() * 2.0**-8).all(dim=1)
        assert bool((near | (found == again).all(dim=1)).all())
        assert 0 < int(near.sum()) < len(near)


@pytest.mark.parametrize("shuffled", [False, True])
def test_groups_out_of_order(shuffled: bool) -> None:
    """Former versions of the library wrote an index; where all of it is -1 it means nothing."""
    weight = random_weight((24, 64), 1, group=16, shuffled=shuffled)
    index = torch.from_numpy(weight.groups) if shuffled else torch.full((64,), -1)
    tensors = {
        "weight_packed": packed_across(weight.numbers),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor([24, 64]),
        "weight_g_idx": index.int(),
    }
    layout = Compressed(settings(True, 16), "here")
    piece = layout.rows(layout.prepare(tensors, (24, 64)), 8, 24)
    assert piece.values().equal(weight.values()[8:].reshape(-1))


def test_awq_is_what_the_library_reads_in_it() -> None:
    """Its own reader of AWQ's layout, and ours, of the same tensors."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    shape = (24, 256)
    tensors = awq(random_weight(shape, 2, dtype=torch.float32, asymmetric=True))
    layout = Awq({"bits": 4, "group_size": 128}, "here")
    ours = layout.rows(layout.prepare(tensors, shape), 0, 24).values().view(shape)
    converted = AutoAWQConverter().process({f"x.{what}": t for what, t in tensors.items()})
    packed = {name.removeprefix("x."): tensor for name, tensor in converted.items()}
    theirs = PackedQuantizationCompressor.decompress(packed, scheme(False, 128))["weight"]
    assert ours.equal(theirs)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another format": ({"format": "int-quantized"}, "format is 'int-quantized', expected 'pack-q"),
    "keys and values": ({"kv_cache_scheme": {"num_bits": 8}}, "found a kv_cache_scheme, expected"),
    "two schemes": ({"config_groups": {"a": {}, "b": {}}}, "found 2 config_groups, expected one"),
    "no schemes": ({"config_groups": None}, "found 0 config_groups, expected one"),
    "no weights": ({"config_groups": {"a": {"weights": None}}}, "has no weights, expected"),
    "activations": (
        {"config_groups": {"a": {"weights": {"num_bits": 4}, "input_activations": {}}}},
        "input_activations is {}, expected None",
    ),
    "eight bits": ({"config_groups": {"a": {"weights": {"num_bits": 8}}}}, "num_bits is 8, exp"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compressed") / "model"
    write(path, settings(True, 128), random_weight, Library(True, 128).encode)
    return path


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(checkpoint: Path, tmp_path: Path, name: str) -> None:
    changes, match = REFUSED[name]
    before = json.loads((checkpoint / "config.json").read_text())
    edit_config(checkpoint, quantization_config=before["quantization_config"] | changes)
    try:
        with pytest.raises(CheckpointError, match=match) as caught:
            quantize_checkpoint(checkpoint, tmp_path / "store", "cpu", progress=False)
        assert "\n" not in str(caught.value)
    finally:
        edit_config(checkpoint, **before)
