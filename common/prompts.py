"""Prompts from a file of JSON. Knows no model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UsageError

MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class Prompt:
    """One text to answer, and what its answer should contain, if that is known."""

    text: str
    expected: str | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """A JSON list or JSON lines of {"input": …, "expected_output": …}. UsageError naming the place."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"prompts file {path} is larger than {MAX_FILE_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"prompts file {path} cannot be read: {reason}") from error
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"prompts file {path} is not a JSON list: {error}") from error
        prompts = [_prompt(record, f"{path}, entry {i}") for i, record in enumerate(records, 1)]
    else:
        prompts = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(
                    f"prompts file {path}, line {number}: not JSON: {error}"
                ) from error
            prompts.append(_prompt(record, f"{path}, line {number}"))
    if not prompts:
        raise UsageError(f"prompts file {path} holds no prompt: expected JSON lines with an input")
    return prompts


def _prompt(record: Any, place: str) -> Prompt:
    if not isinstance(record, dict) or not isinstance(record.get("input"), str):
        raise UsageError(f'prompts file {place}: expected {{"input": "…", "expected_output": "…"}}')
    expected = record.get("expected_output")
    if expected is not None and not isinstance(expected, str):
        raise UsageError(f"prompts file {place}: expected_output is no text")
    try:
        record["input"].encode()
    except UnicodeEncodeError as error:  # which JSON can spell, and no tokenizer reads
        raise UsageError(f"prompts file {place}: half a character: {error.reason}") from error
    return Prompt(record["input"], expected)
