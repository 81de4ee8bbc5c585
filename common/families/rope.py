"""Rotary embeddings: the variants that a config may ask for, and the numbers that each needs.

Only variants whose angles depend on the position alone: with the others (dynamic, longrope) a text would
depend on how many tokens went through the model together. Variants and keys are transformers' own.
"""

from __future__ import annotations

from typing import Any

from common.errors import ConfigError
from common.families.values import is_integer, is_number, show

MAX_THETA = 1e15
#: Keys that a variant must have, and those that it may have.
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "yarn": (
        ("factor",),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
}


def require_rope(config: dict[str, Any]) -> None:
    """Raise ConfigError, in one line, unless the rotary embedding is one of these, with sane numbers."""
    _require_theta(config)
    _require_whole(config)
    for key in ("rope_parameters", "rope_scaling"):
        parameters = config.get(key)
        if parameters is None:
            continue
        if not isinstance(parameters, dict):
            raise ConfigError(f"config.json: {key} is {show(parameters)}, expected an object")
        _require_theta(parameters)
        _require_whole(parameters)
        _require_variant(key, parameters)


def _require_variant(key: str, parameters: dict[str, Any]) -> None:
    nested = next((name for name, value in parameters.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise ConfigError(
            f"config.json: {key} has {show(nested)} for some layers alone, expected one rotary "
            "embedding for all"
        )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ConfigError(
            f"config.json: {key} asks for {show(kind)}, expected one of {', '.join(ROPE_TYPES)}"
        )
    required, optional = ROPE_TYPES[kind]
    for name in (*required, *optional):
        value = parameters.get(name)
        if value is None and name in optional:
            continue
        if not is_number(value, 0, MAX_THETA) or value == 0:
            raise ConfigError(
                f"config.json: {name} of {key} is {show(value)}, expected a number above 0"
            )
    if kind == "llama3" and parameters["low_freq_factor"] >= parameters["high_freq_factor"]:
        raise ConfigError(
            f"config.json: low_freq_factor of {key} is {show(parameters['low_freq_factor'])}, "
            f"expected less than high_freq_factor, {show(parameters['high_freq_factor'])}"
        )
    if not isinstance(parameters.get("truncate", True), bool):
        raise ConfigError(
            f"config.json: truncate of {key} is {show(parameters['truncate'])}, expected true or false"
        )
    original = parameters.get("original_max_position_embeddings")
    if original is not None and not is_integer(original, 1, 1 << 31):
        raise ConfigError(
            f"config.json: original_max_position_embeddings of {key} is {show(original)}, "
            "expected a positive integer"
        )


def _require_theta(config: dict[str, Any]) -> None:
    theta = config.get("rope_theta")
    if theta is not None and (not is_number(theta, 0, MAX_THETA) or theta <= 1):
        raise ConfigError(f"config.json: rope_theta is {show(theta)}, expected a number above 1")


def _require_whole(config: dict[str, Any]) -> None:
    """A head that is turned in part is another model than any of these."""
    part = config.get("partial_rotary_factor")
    if part is not None and (type(part) not in (int, float) or part != 1):
        raise ConfigError(f"config.json: partial_rotary_factor is {show(part)}, expected 1 or none")
