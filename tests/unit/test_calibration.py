"""Calibration walks through the layers as transformers' own model with the quantized weights would."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from common import int4
from common.errors import CheckpointError
from common.families import expected_tensors
from feeder import methods
from feeder.calibration import Packed, calibrated
from feeder.checkpoints.recognize import open_source
from feeder.gptq import Curvature, gptq
from feeder.texts import Rows, longest
from tests import families
from tests.checkpoints import edit_tensors, load_tensors, make_checkpoint, make_model

LENGTHS = (40, 64, 7)
MODELS = {
    "tied": {**families.MODELS["llama, tied"], "model_type": "qwen2"},
    **{
        name: families.MODELS[name]
        for name in ("qwen3, biases, windows by layer", "llama, biases, ungrouped", "mistral")
    },
}
CPU = torch.device("cpu")


def rows(path: Path) -> Rows:
    """Texts of several lengths, none beyond what the model sees whole."""
    config = open_source(path).config
    lengths = tuple(min(length, longest(config)) for length in LENGTHS)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(2, config["vocab_size"], (3, max(lengths)), generator=generator)
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = 0
    return Rows(ids, lengths)


def walk(path: Path) -> Iterator[Packed]:
    return calibrated(open_source(path), rows(path), CPU, lambda: None)


def inputs_of(model: Any, name: str, text: Rows) -> torch.Tensor:
    """What goes into a Linear, text by text."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, given: seen.append(given[0][0])
    )
    with torch.inference_mode():
        for row, length in zip(text.ids, text.lengths, strict=True):
            model(row[None, :length], logits_to_keep=length)
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("kind", ["plain", *MODELS])
def test_every_weight_is_fitted_to_what_the_quantized_model_puts_into_it(
    tmp_path: Path, kind: str
) -> None:
    if kind == "plain":
        path = make_checkpoint(tmp_path / "model", vocab=250, dtype=torch.float32)
    else:
        path = make_model(tmp_path / "model", MODELS[kind])
    edit_tensors(path, lambda tensors: [t.mul_(4) for t in tensors.values() if t.ndim == 2])
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    text = rows(path)
    original = load_tensors(path)
    shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    inputs, last = torch.empty(0), ""
    names = []
    for name, codes, scales in walk(path):
        head, _, leaf = name.rpartition(".")
        leader = f"{head}.{shared.get(leaf, leaf)}".lstrip(".")
        if leader != last:
            inputs, last = inputs_of(model, leader, text), leader
        weight = original[f"{name}.weight"]
        curvature = Curvature.of(inputs.T @ inputs)
        assert curvature is not None and len(inputs) == text.tokens
        expected = gptq(weight, curvature)
        elements = weight.numel()
        same = int4.unpack(codes, elements) == int4.unpack(expected[0], elements)
        assert float(same.float().mean()) > 0.99, name  # sums in another order
        plain = int4.unpack(int4.quantize(weight, methods.rule("search"))[0], elements)
        assert float((int4.unpack(codes, elements) == plain).float().mean()) < 0.9, name
        with torch.no_grad():
            back = int4.dequantize(codes, scales, weight.shape, torch.float32)
            model.get_submodule(name).weight.copy_(back)
        names.append(name)
    assert names == list(expected_tensors(open_source(path).config)[0])


def live_bytes() -> int:
    gc.collect()
    storages = {
        thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()
        for thing in gc.get_objects()
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu"
    }
    return sum(storages.values())


def test_memory_holds_one_layer(tmp_path: Path) -> None:
    path = make_checkpoint(
        tmp_path / "model", hidden=64, intermediate=512, layers=12, heads=2, vocab=64,
        dtype=torch.float32,
    )  # fmt: skip
    layer_bytes = 4 * (3 * 64 * 512 + 4 * 64 * 64)
    most = 0
    gc.collect()
    gc.freeze()  # what there is already is not looked at
    try:
        for name, _, _ in walk(path):
            if name.endswith(("down_proj", "lm_head")):
                most = max(most, live_bytes())
    finally:
        gc.unfreeze()
    # The layer, and of down_proj (K = 512): its Hessian's factor, and what rounding it takes.
    assert layer_bytes < most < layer_bytes + 3 * 4 * 512 * 512
    assert most < 12 * layer_bytes / 2


def test_inputs_that_say_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_checkpoint(tmp_path / "model", layers=1)
    edit_tensors(path, lambda tensors: tensors["model.layers.0.input_layernorm.weight"].zero_())
    with caplog.at_level(logging.WARNING, logger="weight-feeder"):
        found = {name: (codes, scales) for name, codes, scales in walk(path)}
    name = "model.layers.0.self_attn.q_proj"
    expected = int4.quantize(load_tensors(path)[f"{name}.weight"], methods.rule("weighted"))
    assert all(a.equal(b) for a, b in zip(found[name], expected, strict=True))


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", layers=1)
    bad = "model.layers.0.self_attn.o_proj.weight"
    edit_tensors(path, lambda tensors: tensors[bad][0].fill_(float("nan")))
    with pytest.raises(CheckpointError, match="o_proj: found NaN or Inf"):
        list(walk(path))
