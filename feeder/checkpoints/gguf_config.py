"""config.json of a model in a GGUF file, from the file's keys. Knows architectures, not bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import ConfigError

Keys = Callable[[str], Any]


@dataclass(frozen=True)
class Architecture:
    """How an architecture of llama.cpp is called in Hugging Face's configs."""

    model_type: str
    model_class: str
    pairs: bool = (
        False  # whether llama.cpp rotates neighbouring rows of q and k, and so reorders them
    )


ARCHITECTURES = {
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "llama": Architecture("llama", "LlamaForCausalLM", pairs=True),
}
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_SCALINGS = {"linear": "linear", "yarn": "yarn"}
# Llama 3's rotary scaling is in no key. These are the factors that models were published with.
_LLAMA3_FACTORS = (8.0, 32.0)
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192


def architecture_of(keys: Keys) -> Architecture:
    """The architecture that a file says it is of. Raises ConfigError for one that is not known."""
    name = keys("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ConfigError(
            f"general.architecture is {name!r:.60}, expected one of {', '.join(ARCHITECTURES)}; "
            "use a model of one of these"
        )
    return ARCHITECTURES[name]


def build_config(
    keys: Keys, shapes: Mapping[str, tuple[int, ...]], rope_factors: list[float] | None
) -> dict[str, Any]:
    """The config of the model.

    keys: values by their names. shapes: of the tensors, by Hugging Face's names. rope_factors: what rotary
    frequencies are divided by, if the file has such a tensor. Raises ConfigError, in one line, for what is
    missing or not understood.
    """
    architecture = architecture_of(keys)
    prefix = keys("general.architecture")
    _refuse_variants(keys, prefix)
    embedding = shapes.get("model.embed_tokens.weight")
    if embedding is None or len(embedding) != 2:
        raise ConfigError("found no token_embd.weight, expected it in every model")
    config: dict[str, Any] = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "vocab_size": embedding[0],
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "attention_dropout": 0.0,
    }
    for key, name in _SIZES.items():
        config[key] = _positive(keys, f"{prefix}.{name}")
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = _positive(keys, f"{prefix}.attention.head_count_kv", heads)
    config["rms_norm_eps"] = _number(keys, f"{prefix}.attention.layer_norm_rms_epsilon", None)
    width = config["hidden_size"] // heads
    head_dim = _positive(keys, f"{prefix}.attention.key_length", width)
    if head_dim != width or architecture.model_type == "qwen3":
        config["head_dim"] = head_dim
    if architecture.model_type != "qwen2":
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in shapes
    config["rope_parameters"] = _rope(keys, prefix, rope_factors, head_dim)
    for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        token = keys(f"tokenizer.ggml.{name}_token_id")
        if type(token) is int:
            config[key] = token
    return config


def _refuse_variants(keys: Keys, prefix: str) -> None:
    for name in ("expert_count", "attention.sliding_window"):
        if keys(f"{prefix}.{name}"):
            raise ConfigError(
                f"{prefix}.{name} is {keys(f'{prefix}.{name}')!r:.40}, expected none; "
                "such models are not supported"
            )


def _rope(keys: Keys, prefix: str, factors: list[float] | None, head_dim: int) -> dict[str, Any]:
    rotated = keys(f"{prefix}.rope.dimension_count")
    if rotated not in (None, head_dim):
        raise ConfigError(
            f"{prefix}.rope.dimension_count is {rotated!r:.40}, expected all {head_dim} columns of a "
            "head; such models are not supported"
        )
    theta = _number(keys, f"{prefix}.rope.freq_base", 10000.0)
    kind, factor = _scaling(keys, prefix)
    if factors is not None:
        return _llama3(factors, theta, head_dim)
    if kind in (None, "none"):
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in _SCALINGS:
        raise ConfigError(
            f"{prefix}.rope.scaling.type is {kind!r:.40}, expected none, linear or yarn; "
            "use the original checkpoint"
        )
    found: dict[str, Any] = {"rope_type": kind, "rope_theta": theta}
    found["factor"] = _number(keys, factor, None)
    if kind == "yarn":
        attention = f"{prefix}.rope.scaling.attn_factor"
        if keys(attention) not in (None, 1.0):
            raise ConfigError(
                f"{attention} is {keys(attention)!r:.40}, expected 1; use the original checkpoint"
            )
        name = f"{prefix}.rope.scaling.original_context_length"
        found["original_max_position_embeddings"] = _positive(keys, name)
    return found


def _scaling(keys: Keys, prefix: str) -> tuple[Any, str]:
    """The kind of scaling, and the name of the key with its factor, as llama.cpp finds them: a factor
    without a kind means linear, and old files call it otherwise."""
    kind, name = keys(f"{prefix}.rope.scaling.type"), f"{prefix}.rope.scaling.factor"
    if kind in (None, "linear") and keys(name) is None:
        old = f"{prefix}.rope.scale_linear"
        name = name if keys(old) is None else old
    if kind is None and keys(name) not in (None, 0, 1):
        kind = "linear"
    return kind, name


def _llama3(factors: list[float], theta: float, head_dim: int) -> dict[str, Any]:
    """The settings that give these factors. ConfigError if none that are known do."""
    for factor in _LLAMA3_FACTORS:
        expected = [
            _llama3_factor(theta ** (2 * i / head_dim), factor) for i in range(head_dim // 2)
        ]
        if len(factors) == len(expected) and all(
            math.isclose(one, other, rel_tol=1e-4)
            for one, other in zip(factors, expected, strict=True)
        ):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "original_max_position_embeddings": _LLAMA3_CONTEXT,
                **_LLAMA3,
            }
    raise ConfigError(
        "rope_freqs.weight has factors that are not Llama 3's, expected these or none; "
        "use the original checkpoint"
    )


def _llama3_factor(period: float, factor: float) -> float:
    """What the frequency 1 / `period` is divided by: short waves by 1, long ones by `factor`."""
    turns = _LLAMA3_CONTEXT / (2 * math.pi * period)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    share = min(1.0, max(0.0, (turns - low) / (high - low)))
    return 1 / ((1 - share) / factor + share)


def _positive(keys: Keys, name: str, default: int | None = None) -> int:
    found = keys(name)
    if found is None and default is not None:
        return default
    if type(found) is not int or found < 1:
        raise ConfigError(f"{name} is {found!r:.40}, expected a positive whole number")
    return found


def _number(keys: Keys, name: str, default: float | None) -> float:
    found = keys(name)
    if found is None and default is not None:
        return default
    if type(found) not in (int, float) or not math.isfinite(found) or found <= 0:
        raise ConfigError(f"{name} is {found!r:.40}, expected a number above 0")
    # Stored in fp32: the shortest decimal that gives the same fp32 is what was meant.
    return _shortest(float(found))


def _shortest(value: float) -> float:
    for digits in range(1, 9):
        rounded = float(f"{value:.{digits}g}")
        if abs(rounded - value) <= abs(value) * 2.0**-24:
            return rounded
    return value
