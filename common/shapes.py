"""Configs of well-known Qwen2.5 models, so that their shapes can be had without their weights.

Owns plain config dicts. Knows nothing of what is done with them.
"""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
}

# name: hidden, intermediate, layers, heads, key/value heads, vocabulary, tied, epsilon
_TABLE = {
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True, 1e-6),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True, 1e-6),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False, 1e-6),
    "qwen2.5-14b": (5120, 13824, 48, 40, 8, 152064, False, 1e-5),
    "qwen2.5-32b": (5120, 27648, 64, 40, 8, 152064, False, 1e-5),
    "qwen2.5-72b": (8192, 29568, 80, 64, 8, 152064, False, 1e-5),
}
_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "tie_word_embeddings", "rms_norm_eps"),
)

SHAPES: dict[str, dict[str, Any]] = {
    name: _COMMON | dict(zip(_KEYS, row, strict=True)) for name, row in _TABLE.items()
}
