"""Values of a config: what they are, and how a refusal shows them."""

from __future__ import annotations

from typing import Any

from common.errors import ConfigError


def show(value: object) -> str:
    """A value for a message: short, and on one line."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def is_integer(value: object, least: int, most: int) -> bool:
    """Whether the value is an integer from `least` to `most`. A bool is none."""
    return type(value) is int and least <= value <= most


def is_number(value: object, least: float, most: float) -> bool:
    """Whether the value is a finite number from `least` to `most`. A bool is none."""
    return type(value) in (int, float) and least <= value <= most  # type: ignore[operator]


def require_number(config: dict[str, Any], key: str, least: float, most: float) -> None:
    """ConfigError unless `config[key]` is a number from `least` to `most`."""
    value = config.get(key)
    if not is_number(value, least, most):
        raise ConfigError(
            f"config.json: {key} is {show(value)}, expected a number from {least:g} to {most:g}"
        )
