"""Which models the steps are for: what they do not compute, they refuse, with the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.families import FAMILIES
from engine.dense_step import unfit
from engine.step import misfit, supports
from tests.families import MODELS, WINDOW, theirs

FITS: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "sliding_window": 512,
    "pad_token_id": None,
}


def build(config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(theirs(config))


def test_a_family_of_which_no_step_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(FITS | {"model_type": "llama"})
    model.set_attn_implementation("sdpa")
    assert misfit(model) == unfit(model) == ""
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], stepped=False))
    assert misfit(model) == unfit(model) == "there is none for the family llama"


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if FAMILIES[name].stepped])
def test_each_stepped_family_has_models_that_fit(model_type: str) -> None:
    model = build(FITS | {"model_type": model_type})
    assert misfit(model) == ""
    assert supports(model) == "it is not on a GPU"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "qwen3", "attention_bias": True}, "it has biases beside q, k and v's"),
        ({"model_type": "mistral", "sliding_window": 511}, "its window of 511 is shorter than its"),
        ({"model_type": "mistral", "sliding_window": None}, ""),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}
            | {"sliding_window": 100},
            "its window of 100 is shorter than its context of 512",
        ),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2}, ""),
        ({"model_type": "llama", "attention_bias": True}, "it has biases beside q, k and v's"),
        ({"model_type": "llama", "mlp_bias": True}, "it has biases beside q, k and v's"),
        ({"model_type": "llama", "head_dim": 48}, "its heads have 48 elements"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "its activation is gelu"),
        ({"model_type": "llama", "hidden_size": 96}, "its hidden size is 96"),
        ({"model_type": "llama", "intermediate_size": 200}, "its width is 200"),
        (
            {"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "its rotary embedding is dynamic",
        ),
    ],
)
def test_what_it_does_not_compute_is_refused(changes: dict[str, Any], reason: str) -> None:
    found = misfit(build(FITS | changes))
    assert found.startswith(reason) and bool(found) == bool(reason)


def test_biases_of_some_of_q_k_and_v() -> None:
    model = build(FITS | {"model_type": "qwen2"})
    model.model.layers[1].self_attn.k_proj.bias = None
    assert misfit(model) == "it has biases beside q, k and v's"


def test_models_of_the_other_tests() -> None:
    reasons = {name: misfit(build(config)) for name, config in MODELS.items()}
    assert all(reasons.values()), reasons  # all have small heads, if nothing else
    fits = {"head_dim": 32, "hidden_size": 64, "intermediate_size": 128}
    assert f"its window of {WINDOW} is shorter" in misfit(build(MODELS["mistral"] | fits))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "qwen2"}, ""),
        ({"model_type": "llama", "mlp_bias": True, "hidden_act": "gelu", "head_dim": 48}, ""),
        ({"model_type": "qwen3", "attention_bias": True}, ""),
        ({"model_type": "mistral", "sliding_window": 511}, "its window of 511 is shorter than its"),
        ({"model_type": "mistral", "sliding_window": None}, ""),
    ],
)
def test_what_the_dense_step_does_not_do(changes: dict[str, Any], reason: str) -> None:
    model = build(FITS | changes)
    model.set_attn_implementation("sdpa")
    found = unfit(model)
    assert found.startswith(reason) and bool(found) == bool(reason)
    if not reason:
        model.set_attn_implementation("eager")
        assert unfit(model) == "its attention is eager"
