"""Families on a GPU: the fused step of those that have one, transformers' own forward of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.cache import as_argument, make_cache, windows_of
from engine.step import Step, supports
from feeder.quantize import quantize_checkpoint
from tests import fed
from tests.checkpoints import make_model
from tests.families import MODELS
from tests.gpu.test_cuda_step import PROMPT, expected_logits, stepped
from tests.processes import Room
from tests.reference import all_logits, reference_model

_SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 576, "num_hidden_layers": 3, "vocab_size": 320,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

#: No biases; heads that are not hidden_size over heads, or have norms; rotary tables that are scaled.
STEPPED: dict[str, dict[str, Any]] = {
    "llama": {
        **_SIZES, "model_type": "llama", "head_dim": 64, "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3 | {"original_max_position_embeddings": 64},
    },
    "qwen3": {**_SIZES, "model_type": "qwen3", "head_dim": 64, "rope_theta": 1000000.0},
    "llama, tied": {**_SIZES, "model_type": "llama", "tie_word_embeddings": True},
    "mistral": {
        **_SIZES, "model_type": "mistral", "head_dim": 128, "sliding_window": 512,
        "rope_parameters": _YARN | {"rope_theta": 10000.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("cache_flag", ["-1", "4"])
@pytest.mark.parametrize("name", STEPPED)
def test_the_step_of_other_families(room: Room, tmp_path: Path, name: str, cache_flag: str) -> None:
    """As tests/gpu/test_cuda_step.py has it for Qwen2: at most 1.5 times transformers' own error."""
    checkpoint = make_model(tmp_path / "model", STEPPED[name], seed=4)
    quantize_checkpoint(checkpoint, tmp_path / "store", "cuda", progress=False)
    generator = torch.Generator().manual_seed(8)
    ids = PROMPT + torch.randint(320, (300,), generator=generator).tolist()
    expected = expected_logits(checkpoint, ids)
    flags = ("--device=cuda", "--dtype=bfloat16", f"--cache={cache_flag}", "--slots=packed")
    with fed.model(room, tmp_path / "store", *flags) as (model, engine), torch.inference_mode():
        assert supports(model) == ""
        step = Step(model, engine.client)
        cache = make_cache(3, len(PROMPT) + 1, windows=windows_of(model.config))
        prompt = torch.tensor([PROMPT], device="cuda")
        model(input_ids=prompt, **as_argument(cache), use_cache=True, logits_to_keep=1)
        found = torch.stack(stepped(step, model, ids[len(PROMPT) :], cache))
        step.rest()
        plain = model(input_ids=torch.tensor([ids], device="cuda")).logits[0].float()
    ours = (found - expected[len(PROMPT) :]).abs().max()
    theirs = (plain - expected).abs().max()
    assert theirs > 0
    assert ours <= 1.5 * theirs, (float(ours), float(theirs))


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_bfloat16_are_those_of_the_plain_model(
    room: Room, tmp_path: Path, name: str
) -> None:
    checkpoint = make_model(tmp_path / "model", MODELS[name], seed=5)
    quantize_checkpoint(checkpoint, tmp_path / "store", "cuda", progress=False)
    flags = ("--cache=3", "--device=cuda", "--dtype=bfloat16", "--slots=dequantized")
    with fed.model(room, tmp_path / "store", *flags) as (model, _):
        assert supports(model) != ""
        # After the engine's model, which turns cuDNN's attention off for the process.
        reference = reference_model(checkpoint, torch.bfloat16, "cuda")
        for ours, theirs in zip(all_logits(model), all_logits(reference), strict=True):
            assert theirs.isfinite().all() and theirs.std() > 0.01
            assert torch.equal(ours, theirs), (ours - theirs).abs().max()
