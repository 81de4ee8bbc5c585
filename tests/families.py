"""Small models of every family: what each can have that Qwen2 has not, in few and cheap models.

An entry of common/families/table.py needs one or more here; tests then hold it to transformers.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoConfig

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
WINDOW = 9  # of those that have one: shorter than any prompt of the tests
_WINDOWED = {"use_sliding_window": True, "sliding_window": WINDOW}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

#: Configs as config.json has them, of either version of transformers. The first of a family has the most
#: that is unusual at once.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2, the last layer with a window": {
        **_SIZES, **_WINDOWED, "model_type": "qwen2", "max_window_layers": 2,
        "rope_theta": 10000.0, "rope_scaling": _YARN,
    },
    "qwen3, biases, windows by layer": {
        **_SIZES, **_WINDOWED, "model_type": "qwen3", "head_dim": 24, "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    },
    "llama, biases, ungrouped": {
        **_SIZES, "model_type": "llama", "head_dim": 32, "attention_bias": True, "mlp_bias": True,
        "num_key_value_heads": None, "rope_theta": 500000.0, "rope_scaling": _LLAMA3,
    },
    "mistral": {
        **_SIZES, "model_type": "mistral", "head_dim": 8, "sliding_window": WINDOW,
        "rope_parameters": _YARN | {"rope_theta": 10000.0},
    },
    "qwen3": {
        **_SIZES, "model_type": "qwen3", "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "llama, tied": {**_SIZES, "model_type": "llama", "tie_word_embeddings": True},
    "mistral without a window": {**_SIZES, "model_type": "mistral", "sliding_window": None},
}  # fmt: skip


def theirs(config: dict[str, Any]) -> Any:
    """What transformers makes of a config.json. It writes into what it is given, so that is a copy."""
    return AutoConfig.for_model(**copy.deepcopy(config))
