"""A model a layer at a time, of any kind of checkpoint: the values are those that it stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ConfigError, UsageError
from demo import tokenizer
from feeder.checkpoints.recognize import open_source
from feeder.layerwise import Decoder, of_source, of_store
from feeder.quantize import quantize_checkpoint
from feeder.texts import Excerpt
from tests import families
from tests.checkpoints import edit_config, make_checkpoint, make_hollow_checkpoint, make_model
from tests.ready_made import gptq, random_weight, write

SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
CPU = torch.device("cpu")


def test_a_ready_made_checkpoint_is_measured_against_its_own_values(tmp_path: Path) -> None:
    model = tmp_path / "model"
    values = write(model, SETTINGS, random_weight, gptq, vocab=320)
    tokenizer.build().save_pretrained(model)
    text = tmp_path / "text"
    text.write_text("1.1+2.3=? " * 20)
    excerpt = Excerpt(text, 100, 64, measured=True)
    store = quantize_checkpoint(
        model, tmp_path / "store", "cpu", progress=False, measurement=excerpt
    )
    read = of_source(open_source(model), CPU, torch.float32)
    stored = of_store(store, CPU, torch.float32)
    for name, expected in values.items():
        assert read(name).equal(expected.float()), name
        if name != "lm_head.weight":  # which is no code yet
            assert stored(name) == pytest.approx(expected.float(), rel=2**-8, abs=1e-30), name
    assert store.quality is not None and 0 < store.quality.kl_mean < 0.01
    assert store.quality.tokens == 100
    with pytest.raises(UsageError, match="the checkpoint is gptq, and its codes are kept"):
        quantize_checkpoint(model, tmp_path / "again", "cpu", progress=False, method="gptq")


def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """The C library would keep what each layer's matrices took."""
    model = make_hollow_checkpoint(tmp_path / "model", num_hidden_layers=16)
    source = open_source(model)
    decoder, read = Decoder(source.config, CPU), of_source(source, CPU, torch.float32)
    taken = []
    for index in range(decoder.count):
        decoder.layer(index, read)
        decoder.leave(index)
        taken.append(anonymous_bytes())
    layer_bytes = 7 * 4 * 1024**2
    assert taken[-1] < taken[1] + layer_bytes


def anonymous_bytes() -> int:
    """Memory of this process that is of no file."""
    [line] = [s for s in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in s]
    return int(line.split()[1]) << 10


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text("1.1+2.3=? " * 60)
    return path


def test_the_config_stays_as_the_checkpoint_has_it(tmp_path: Path, text: Path) -> None:
    """Transformers writes into the nested settings of rotation that it is given."""
    config = {**families.MODELS["llama, biases, ungrouped"], "vocab_size": 320}
    model = make_model(tmp_path / "model", config)
    (model / "config.json").write_text(json.dumps(config))
    tokenizer.build().save_pretrained(model)
    excerpt = Excerpt(text, 200, 64, measured=False)
    store = quantize_checkpoint(
        model, tmp_path / "store", "cpu", progress=False, method="gptq", calibration=excerpt
    )
    assert "rope_scaling" in config
    assert store.config == json.loads((model / "config.json").read_text()) == config
    assert store.config == json.loads((store.path / "config.json").read_text())


def test_nothing_is_dropped_at_random(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", layers=1)
    edit_config(path, attention_dropout=0.5)
    source = open_source(path)
    decoder = Decoder(source.config, CPU)
    layer = decoder.layer(0, of_source(source, CPU, torch.float32))
    states = torch.randn(1, 16, 96, generator=torch.Generator().manual_seed(1))
    assert decoder.forward(layer, states).equal(decoder.forward(layer, states))


@pytest.mark.parametrize("how", ["gptq", "measure"])
def test_what_transformers_refuses_is_said_before_the_work(
    tmp_path: Path, text: Path, how: str
) -> None:
    model = make_checkpoint(tmp_path / "model", layers=1)
    edit_config(model, pad_token_id=10**6)
    tokenizer.build().save_pretrained(model)
    excerpt = Excerpt(text, 200, 64, measured=how == "measure")
    more: dict[str, Any] = {"method": "gptq", "calibration": excerpt}
    with pytest.raises(ConfigError, match=r"transformers 5.* refuses it: .+") as caught:
        quantize_checkpoint(
            model, tmp_path / "store", "cpu", progress=False,
            **(more if how == "gptq" else {"measurement": excerpt}),
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*store*"))


def test_a_head_dim_of_null_is_none(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", layers=1)
    config = json.loads((path / "config.json").read_text()) | {"head_dim": None}
    assert Decoder(config, CPU).count == 1
