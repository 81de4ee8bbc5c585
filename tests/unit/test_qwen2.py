"""The tensor table against transformers' own model, and configs that make no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM

from common.errors import ConfigError
from common.qwen2 import expected_tensors, is_tied, model_dtype, validate_config
from common.shapes import SHAPES

GOOD: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": None},
        {"head_dim": 40},
        *({**shape, "num_hidden_layers": 2} for shape in SHAPES.values()),
    ],
)
def test_table_is_that_of_transformers(changes: dict[str, Any]) -> None:
    config = GOOD | changes
    validate_config(config)
    linear, residents = expected_tensors(config)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**config))
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if is_tied(config):
        assert state.pop("lm_head.weight") == state["model.embed_tokens.weight"]
    assert {f"{name}.weight": shape for name, shape in linear.items()} | residents == state


def test_order_is_that_of_use() -> None:
    linear, _ = expected_tensors(GOOD)
    parts = [name.removeprefix("model.layers.") for name in linear]
    layer = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    expected = [f"{index}.{part}" for index in range(2) for part in layer]
    assert [part.replace("self_attn.", "").replace("mlp.", "") for part in parts] == [
        *expected,
        "lm_head",
    ]


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": None, "torch_dtype": "torch.float32"}, "float32"),
        ({}, None),
    ],
)
def test_dtype_of_transformers_4_and_5(config: dict[str, Any], dtype: str | None) -> None:
    assert model_dtype(config) == dtype


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "model_type is None, expected 'qwen2'"),
        ({"vocab_size": 0}, "vocab_size is 0, expected a positive integer"),
        ({"vocab_size": True}, "vocab_size is True, expected a positive integer"),
        ({"hidden_size": 96.0}, "hidden_size is 96.0, expected a positive integer"),
        ({"hidden_size": "x" * 999}, "expected a positive integer"),
        ({"hidden_size": 98}, "hidden_size is 98, expected a multiple of num_attention_heads, 4"),
        ({"num_key_value_heads": 3}, "expected a multiple of num_key_value_heads, 3"),
        ({"head_dim": -1}, "head_dim is -1, expected a positive integer"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, expected at most 4096"),
        ({"vocab_size": 1 << 40}, "make a tensor of 105553116266496 elements, expected at most"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
        ({"rope_scaling": 4}, "rope_scaling is 4, expected an object"),
        ({"rope_theta": -1}, "rope_theta is -1, expected a number above 0"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta is 'x', expected a number"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of bfloat16, float16, float32"),
        ({"torch_dtype": ["float32"]}, "torch_dtype is ['float32'], expected one of"),
    ],
)
def test_nonsense_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_config(GOOD | changes)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("key", sorted(GOOD.keys() - {"tie_word_embeddings"}))
def test_missing_keys_are_named(key: str) -> None:
    config = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(ConfigError, match=key):
        validate_config(config)


texts = st.text("ab\n\0é", max_size=60)
values = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.lists(st.none())
keys = st.sampled_from([*GOOD, "head_dim", "dtype", "torch_dtype", "rope_theta", "rope_scaling"])


@given(st.dictionaries(keys, values | st.dictionaries(texts, values), max_size=4))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_values_are_taken_or_refused_never_more(changes: dict[str, Any]) -> None:
    try:
        validate_config(GOOD | changes)
    except ConfigError as error:
        assert str(error).splitlines() == [str(error)]
