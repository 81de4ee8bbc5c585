"""The tensor table against transformers' own model, and configs that make no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from common.errors import ConfigError
from common.families import (
    FAMILIES,
    attention_widths,
    expected_tensors,
    family_of,
    is_tied,
    model_dtype,
    validate_config,
    windows,
)
from common.shapes import SHAPES
from engine.cache import windows_of
from tests.families import MODELS, theirs

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


CONFIGS: dict[str, dict[str, Any]] = {
    "tied": GOOD | {"tie_word_embeddings": True},
    "ungrouped": GOOD | {"num_key_value_heads": 4},
    "null is ungrouped": GOOD | {"num_key_value_heads": None},
    "head_dim": GOOD | {"head_dim": 40},
    **MODELS,
    **{name: shape | {"num_hidden_layers": 2} for name, shape in SHAPES.items()},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_table_is_that_of_transformers(name: str) -> None:
    config = CONFIGS[name]
    validate_config(config)
    linear, residents = expected_tensors(config)
    made = theirs(config)
    assert windows(config) == windows_of(made) == windows(made.to_dict())
    assert attention_widths(config) == attention_widths(made.to_dict())  # as an engine has it
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(made)
    assert type(model).__name__ == family_of(config).architecture
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if is_tied(config):
        assert state.pop("lm_head.weight") == state["model.embed_tokens.weight"]
    assert {f"{name}.weight": shape for name, shape in linear.items()} | residents == state


def test_every_family_is_tested() -> None:
    assert {config["model_type"] for config in MODELS.values()} == FAMILIES.keys()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_a_silent_config_means_is_what_it_means_to_transformers(model_type: str) -> None:
    config = {key: value for key, value in GOOD.items() if key != "tie_word_embeddings"}
    config |= {"model_type": model_type, "hidden_size": 64}
    if not FAMILIES[model_type].names_kv_heads:
        del config["num_key_value_heads"]
    validate_config(config)
    made = theirs(config)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(made)
    linear, _ = expected_tensors(config)
    assert "lm_head" in linear
    for name, shape in linear.items():
        assert tuple(model.get_submodule(name).weight.shape) == shape
    assert windows(config) == windows_of(made)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", MODELS)
def test_order_is_that_of_use(name: str) -> None:
    """Of Linears, as the modules are called in a forward pass; of groups, by one and the same input."""
    model: Any = AutoModelForCausalLM.from_config(theirs(MODELS[name]))
    called: list[tuple[str, torch.Tensor]] = []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x, path=path: called.append((path, x[0])))
    model(torch.tensor([[1, 2, 3]]))
    linear, _ = expected_tensors(MODELS[name])
    tied = ["lm_head"] if is_tied(MODELS[name]) else []
    assert [path for path, _ in called] == [*linear, *tied]
    inputs = dict(called)
    for group in family_of(MODELS[name]).groups:
        assert len({id(inputs[f"model.layers.1.{part}"]) for part in group}) == 1


def test_order_by_hand() -> None:
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


QWEN3, LLAMA, MISTRAL = (
    GOOD | {"model_type": kind, "hidden_size": 64} for kind in ("qwen3", "llama", "mistral")
)
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
WINDOWED = {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "model_type is None, which is not supported; supported are qwen2"),
        ({"model_type": "gemma2"}, "'gemma2', which is not supported; supported are qwen2, qwen3"),
        ({"model_type": ["qwen2"]}, "model_type is ['qwen2'], which is not supported"),
        ({"vocab_size": 0}, "vocab_size is 0, expected a positive integer"),
        ({"vocab_size": 10**12, "hidden_size": 8}, "make a tensor of 8000000000000 elements"),
        ({"vocab_size": True}, "vocab_size is True, expected a positive integer"),
        ({"vocab_size": float("nan")}, "vocab_size is nan, expected a positive integer"),
        ({"vocab_size": 10**4000}, "vocab_size is 1000"),
        ({"hidden_size": 96.0}, "hidden_size is 96.0, expected a positive integer"),
        ({"hidden_size": "x" * 999}, "expected a positive integer"),
        ({"hidden_size": 98}, "hidden_size is 98, expected a multiple of num_attention_heads, 4"),
        ({"hidden_size": 12}, "heads have 3 elements, expected an even number"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4, expected a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a positive integer"),
        ({"num_key_value_heads": 3}, "expected a multiple of num_key_value_heads, 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, expected a positive integer"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True, expected a positive"),
        ({"num_key_value_heads": 1 << 70}, "num_key_value_heads is 1180591620717411303424, exp"),
        ({"head_dim": -1}, "head_dim is -1, expected a positive integer"),
        ({"head_dim": 0}, "head_dim is 0, expected a positive integer"),
        ({"head_dim": float("nan")}, "head_dim is nan, expected a positive integer"),
        ({"head_dim": 1 << 38}, "make a tensor of 105553116266496 elements, expected at most"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected at most 4096"),
        ({"vocab_size": 1 << 40}, "make a tensor of 105553116266496 elements, expected at most"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings is 'many', expected a pos"),
        ({"max_position_embeddings": 1 << 60}, "expected a positive integer of at most 2147483648"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
        ({"hidden_act": "swiglu"}, "hidden_act is 'swiglu', expected one of silu"),
        ({"hidden_act": ["silu"]}, "hidden_act is ['silu'], expected one of silu"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a number from 0 to 1"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None, expected a number from 0 to 1"),
        ({"rope_scaling": 4}, "rope_scaling is 4, expected an object"),
        ({"rope_theta": -1}, "rope_theta is -1, expected a number above 1"),
        ({"rope_theta": 10**400}, "expected a number above 1"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta is 'x', expected a number"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "asks for 'dynamic', expected one of"),
        ({"rope_scaling": {"type": "mrope"}}, "asks for 'mrope', expected one of default, linear"),
        ({"rope_scaling": {"rope_type": []}}, "rope_scaling asks for [], expected one of"),
        ({"rope_scaling": {"type": "linear"}}, "factor of rope_scaling is None, expected a number"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, "factor of rope_scaling is 0, expected"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": "x"}}, "beta_fast of rope_sc"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": 3}}, "truncate of rope_scal"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, "expected less than high_freq_factor"),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}},
            "original_max_position_embeddings of rope_scaling is 0, expected a positive integer",
        ),
        ({"rope_parameters": {"full_attention": {}}}, "has 'full_attention' for some layers alone"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1 or none"),
        ({"sliding_window": -1}, "sliding_window is -1, expected null or an integer from 2"),
        ({"sliding_window": True}, "sliding_window is True, expected null or an integer from 2"),
        ({"max_window_layers": -1}, "max_window_layers is -1, expected an integer of at least 0"),
        ({"use_sliding_window": 1}, "use_sliding_window is 1, expected true or false"),
        ({"layer_types": "full"}, "layer_types is 'full', expected a list of 'full_attention'"),
        ({"layer_types": ["linear_attention"] * 2}, "expected a list of 'full_attention' and"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, expected one for each"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "of a qwen2 say 'full_attent"),
        (WINDOWED | {"sliding_window": None}, "says 'sliding_attention' of layer 1, the other"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of bfloat16, float16, float32"),
        ({"torch_dtype": ["float32"]}, "torch_dtype is ['float32'], expected one of"),
        (QWEN3 | {"attention_bias": "no"}, "attention_bias is 'no', expected true or false"),
        (QWEN3 | {"head_dim": None}, "head_dim is None, expected a positive integer"),
        (LLAMA | {"mlp_bias": 0}, "mlp_bias is 0, expected true or false"),
        (LLAMA | {"hidden_size": 66, "head_dim": 16}, "expected a multiple of num_attention_hea"),
        (MISTRAL | {"layer_types": ["full_attention"] * 2}, "of a mistral say 'sliding_attention'"),
    ],
)
def test_nonsense_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_config(GOOD | changes)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 220


@pytest.mark.parametrize("key", sorted(GOOD.keys() - {"tie_word_embeddings"}))
def test_missing_keys_are_named(key: str) -> None:
    config = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(ConfigError, match=key):
        validate_config(config)


texts = st.text("ab\n\0é", max_size=60)
values = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.lists(st.none())
keys = st.sampled_from(
    [*GOOD, *("head_dim", "dtype", "torch_dtype", "rope_theta", "rope_scaling", "rope_parameters"),
     *("sliding_window", "layer_types", "attention_bias", "hidden_act", "rms_norm_eps")]
)  # fmt: skip


@given(st.dictionaries(keys, values | st.dictionaries(texts, values), max_size=4))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_values_are_taken_or_refused_never_more(changes: dict[str, Any]) -> None:
    try:
        validate_config(GOOD | changes)
    except ConfigError as error:
        assert str(error).splitlines() == [str(error)]
