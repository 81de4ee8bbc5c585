"""Prompts, and the records that answers become. Knows no model."""

from __future__ import annotations

import json

from common.prompts import Prompt, read_prompts

__all__ = ["Prompt", "read_prompts", "record"]


def record(prompt: Prompt, output: str, tokens: int, seconds: float, ttft_s: float) -> str:
    """The JSON line of one answer. ``found``: whether the expected output is in it; null if none."""
    found = None if prompt.expected is None else prompt.expected in output
    fields = {
        "input": prompt.text,
        "expected_output": prompt.expected,
        "output": output,
        "tokens": tokens,
        "seconds": round(seconds, 6),
        "ttft_s": round(ttft_s, 6),
        "found": found,
    }
    return json.dumps(fields, ensure_ascii=False)
