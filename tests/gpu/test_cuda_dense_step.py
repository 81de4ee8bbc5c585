"""Single tokens with dequantized slots on a GPU: the plain model's logits to the last bit, with graphs
between the products, however weights come and go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common import protocol as p
from engine.cache import as_argument, make_cache, reserve
from engine.dense_step import DenseStep, unfit
from engine.steps import steps_for
from feeder.quantize import quantize_checkpoint
from tests import fed, lives
from tests.checkpoints import make_model
from tests.processes import Room
from tests.reference import reference_model
from tests.stepping import LAYER, assert_stepped_as_plain

TOKENS = 40
MODELS = {
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    # As wide as kernels of real models are chosen by; the head is fed.
    "qwen2, wide": {
        "model_type": "qwen2", "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 4096,
    },
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "qwen3": {"model_type": "qwen3", "attention_bias": True},
    "mistral": {"model_type": "mistral", "num_attention_heads": 3, "num_key_value_heads": 3},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_plain_model(
    room: Room, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    checkpoint = make_model(tmp_path / "model", LAYER | MODELS[name])
    quantize_checkpoint(checkpoint, tmp_path / "store", "cuda", progress=False)
    kind = str(dtype).removeprefix("torch.")
    flags = ("--device=cuda", f"--dtype={kind}", "--slots=dequantized", "--cache=1")
    with fed.model(room, tmp_path / "store", *flags, attention="sdpa") as (model, engine):
        # After the engine's model, which turns cuDNN's attention off for the process.
        reference = reference_model(checkpoint, dtype, "cuda")
        assert unfit(model) == ""
        step = DenseStep(model, engine.client)
        assert_stepped_as_plain(step, model, reference, TOKENS)
        for strategy, cache in (("resident", "2"), ("ring", "7"), ("resident", "-1")):
            lives.ask(room, p.Swap(strategy, cache))
            assert_stepped_as_plain(step, model, reference, TOKENS)
        again = DenseStep(model, engine.client)  # its graphs beside those of the other
        assert_stepped_as_plain(again, model, reference, TOKENS)
        assert_stepped_as_plain(step, model, reference, TOKENS)


def test_the_one_that_is_useful_takes_the_token(room: Room, tmp_path: Path) -> None:
    """While slots are packed the fused step does, whose logits are fp32; before and after, the dense one."""
    checkpoint = make_model(tmp_path / "model", LAYER | MODELS["qwen2, wide"])
    quantize_checkpoint(checkpoint, tmp_path / "store", "cuda", progress=False)
    flags = ("--device=cuda", "--dtype=bfloat16", "--slots=dequantized", "--cache=-1")
    with fed.model(room, tmp_path / "store", *flags, attention="sdpa") as (model, engine):
        reference = reference_model(checkpoint, torch.bfloat16, "cuda")
        steps = steps_for(model, engine.client)
        assert steps is not None and steps.useful and not steps.packed
        assert_stepped_as_plain(steps, model, reference, TOKENS)
        lives.ask(room, p.Swap("", "", "packed"))
        engine.client.ask_status()  # so that it knows
        assert steps.useful and steps.packed
        token = torch.zeros((1, 1), dtype=torch.int64, device="cuda")
        with torch.inference_mode():
            cache = make_cache(model.config.num_hidden_layers, 8)
            model(input_ids=token, **as_argument(cache), use_cache=True)
            reserve(cache, 2)
            assert steps(token, cache).dtype == torch.float32
        steps.rest()
        lives.ask(room, p.Swap("ring", "5", "dequantized"))
        engine.client.ask_status()  # so that it knows
        assert steps.useful and not steps.packed
        assert_stepped_as_plain(steps, model, reference, TOKENS)
