"""A model a layer at a time, of any kind of checkpoint: the values are those that it stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.errors import UsageError
from demo import tokenizer
from feeder.checkpoints.recognize import open_source
from feeder.layerwise import of_source, of_store
from feeder.quantize import quantize_checkpoint
from feeder.texts import Excerpt
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
    with pytest.raises(UsageError, match="this is a gptq checkpoint, whose codes are kept"):
        quantize_checkpoint(model, tmp_path / "again", "cpu", progress=False, method="gptq")
