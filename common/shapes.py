"""Configs of well-known models, so that their shapes can be had without their weights.

Owns plain config dicts. Knows nothing of what is done with them.
"""

from __future__ import annotations

from typing import Any

_QWEN2: dict[str, Any] = {
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
_QWEN3 = _QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}

# family; hidden, intermediate, layers, heads, key/value heads, vocabulary, tied, epsilon
_TABLE = {
    "qwen2.5-0.5b": (_QWEN2, 896, 4864, 24, 14, 2, 151936, True, 1e-6),
    "qwen2.5-1.5b": (_QWEN2, 1536, 8960, 28, 12, 2, 151936, True, 1e-6),
    "qwen2.5-7b": (_QWEN2, 3584, 18944, 28, 28, 4, 152064, False, 1e-6),
    "qwen2.5-14b": (_QWEN2, 5120, 13824, 48, 40, 8, 152064, False, 1e-5),
    "qwen2.5-32b": (_QWEN2, 5120, 27648, 64, 40, 8, 152064, False, 1e-5),
    "qwen2.5-72b": (_QWEN2, 8192, 29568, 80, 64, 8, 152064, False, 1e-5),
    "qwen3-8b": (_QWEN3, 4096, 12288, 36, 32, 8, 151936, False, 1e-6),
    "qwen3-32b": (_QWEN3, 5120, 25600, 64, 64, 8, 151936, False, 1e-6),
    "llama-3.1-8b": (_LLAMA, 4096, 14336, 32, 32, 8, 128256, False, 1e-5),
    "llama-3.1-70b": (_LLAMA, 8192, 28672, 80, 64, 8, 128256, False, 1e-5),
    "mistral-7b": (_MISTRAL, 4096, 14336, 32, 32, 8, 32768, False, 1e-5),
}
_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "tie_word_embeddings", "rms_norm_eps"),
)

SHAPES: dict[str, dict[str, Any]] = {
    name: common | dict(zip(_KEYS, row, strict=True)) for name, (common, *row) in _TABLE.items()
}
