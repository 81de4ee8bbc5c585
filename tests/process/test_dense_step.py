"""Single tokens with dequantized slots: transformers' logits to the last bit, without its modules.

Here without CUDA graphs; tests/gpu/test_cuda_dense_step.py has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common import protocol as p
from engine.cache import as_argument, make_cache
from engine.dense_step import DenseStep
from feeder.quantize import quantize_checkpoint
from tests import fed, lives
from tests.checkpoints import make_model
from tests.processes import Room
from tests.reference import reference_model
from tests.stepping import LAYER, assert_stepped_as_plain, take_in_passes

TOKENS = 10
#: How wide, and how many of their tokens are kept.
PASSES = ((2, 2), (3, 1), (16, 16), (1, 1), (5, 2), (2, 2))


def test_logits_are_those_of_the_plain_model(room: Room, tmp_path: Path) -> None:
    config = LAYER | {"model_type": "qwen2", "tie_word_embeddings": True}
    checkpoint = make_model(tmp_path / "model", config)
    quantize_checkpoint(checkpoint, tmp_path / "store", "cpu", progress=False)
    reference = reference_model(checkpoint, torch.float32)
    flags = ("--slots=dequantized", "--cache=2")
    with fed.model(room, tmp_path / "store", *flags) as (model, engine):
        step = DenseStep(model, engine.client)
        assert_stepped_as_plain(step, model, reference, TOKENS)
        take_in_passes(step, step.several, model, 250, PASSES, seed=5)
        for strategy, cache in (("resident", "7"), ("ring", "-1")):
            lives.ask(room, p.Swap(strategy, cache))
            assert_stepped_as_plain(step, model, reference, TOKENS)
        assert step.useful
        # On the CPU a packed slot's product is that of a dequantized one, so this shows nowhere.
        lives.ask(room, p.Swap("", "", "packed"))
        assert_stepped_as_plain(step, model, reference, TOKENS)
        assert not step.useful
        cache = make_cache(model.config.num_hidden_layers, 256)
        ids = torch.zeros((1, 256), dtype=torch.int64)
        with torch.inference_mode():
            model(input_ids=ids, **as_argument(cache), use_cache=True, logits_to_keep=1)
        with pytest.raises(ValueError, match="the cache holds 256 tokens, and all are there"):
            step(ids[:, :1], cache)
        with pytest.raises(ValueError, match="17 tokens: a pass takes from 1 to 16"):
            step.several(ids[:, :17], cache)
        cache.layers[0].set_length(250)
        with pytest.raises(ValueError, match="the cache holds 256 tokens, and 250 are there"):
            step.several(ids[:, :7], cache)


@pytest.mark.parametrize(
    "family",
    [
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        {"model_type": "qwen3", "attention_bias": True},
    ],
    ids=["llama", "qwen3"],
)
def test_other_families_in_another_dtype(
    room: Room, tmp_path: Path, family: dict[str, Any]
) -> None:
    checkpoint = make_model(tmp_path / "model", LAYER | family)
    quantize_checkpoint(checkpoint, tmp_path / "store", "cpu", progress=False)
    reference = reference_model(checkpoint, torch.bfloat16)
    flags = ("--slots=dequantized", "--cache=3", "--dtype=bfloat16")
    with fed.model(room, tmp_path / "store", *flags) as (model, engine):
        step = DenseStep(model, engine.client)
        assert_stepped_as_plain(step, model, reference, TOKENS)
        take_in_passes(step, step.several, model, 9, PASSES[1:3], seed=6)
