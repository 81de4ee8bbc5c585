"""The former home of `common.families`; goes when nothing imports it any more."""

from common.families import (
    attention_widths,
    expected_tensors,
    is_tied,
    model_dtype,
    validate_config,
)

__all__ = ["attention_widths", "expected_tensors", "is_tied", "model_dtype", "validate_config"]
