"""Prompt files, good and bad, and the records that answers become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UsageError
from engine.prompts import Prompt, read_prompts, record

RECORDS = [
    {"input": "1.1+2.3=?", "expected_output": "3.4"},
    {"input": "näïve 中文 \U0001f600"},
    {"input": "", "expected_output": None, "more": [1, {"a": 2}]},
    {"input": "two\nlines\r\n\ttab", "expected_output": ""},
    {"input": "line\u2028separator\x85next\x0bvertical\x1cfile", "expected_output": "\u2029"},
]
PROMPTS = [Prompt(r["input"], r.get("expected_output")) for r in RECORDS]  # type: ignore[arg-type]


def written(path: Path, text: str | bytes) -> Path:
    file = path / "prompts"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize("ascii_only", [True, False])
def test_lines_and_lists_say_the_same(tmp_path: Path, ascii_only: bool) -> None:
    lines = [json.dumps(r, ensure_ascii=ascii_only) for r in RECORDS]
    whole = json.dumps(RECORDS, ensure_ascii=ascii_only, indent=2)
    for text in (
        "\n".join(lines), "\n".join(lines) + "\n", "\r\n".join(lines), "\n\n \n".join(lines),
        "\n" + "\n".join(lines), whole, f"\n  {whole}\n",
    ):  # fmt: skip
        assert read_prompts(written(tmp_path, text)) == PROMPTS


@given(st.lists(st.text(), min_size=1, max_size=5))
def test_any_text_is_read_as_it_was_written(tmp_path_factory: Any, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("prompts")
    answered = "\n".join(record(Prompt(text), text, 1, 0.5, 0.1) for text in texts)
    assert [prompt.text for prompt in read_prompts(written(path, answered))] == texts


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"input": "a"}\n{"input": 1}', "line 2: expected"),
        ('{"input": "a"}\n\n{"inputs": "b"}', "line 3: expected"),
        ('{"input": "a"}\n["b"]', "line 2: expected"),
        ('"a"', "line 1: expected"),
        ('{"input": "a", "expected_output": 3.4}', "line 1: expected_output is no text"),
        (r'{"input": "a\ud800"}', "line 1: half a character"),
        ('{"input": "a"}\n{"input": ', "line 2: not JSON"),
        ('{"input": "a"} {"input": "b"}', "line 1: not JSON"),
        ("1.1+2.3=?", "line 1: not JSON"),
        ("{" * 5, "line 1: not JSON"),
        ('{"a":' * 100_000, "line 1: not JSON"),
        ('[{"input": "a"}, {"input": null}]', "entry 2: expected"),
        ("[1]", "entry 1: expected"),
        ('[{"input": "a"}', "is not a JSON list"),
        ('[{"input": "a"}]\n{"input": "b"}', "is not a JSON list"),
        ("[" * 100_000, "is not a JSON list"),
        ("", "holds no prompt"),
        (" \n\n", "holds no prompt"),
        ("[]", "holds no prompt"),
        (b'{"input": "\xff"}', "cannot be read"),
    ],
)
def test_bad_files_are_refused_naming_the_place(
    tmp_path: Path, text: str | bytes, place: str
) -> None:
    file = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_prompts(file)
    assert str(caught.value).startswith(f"prompts file {file}")
    assert place in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(tmp_path / "absent")
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(tmp_path)


def test_a_file_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, "")
    with file.open("r+b") as hole:
        hole.truncate((1 << 30) + 1)
    with pytest.raises(UsageError, match="larger than 1,073,741,824 bytes"):
        read_prompts(file)


@pytest.mark.parametrize(
    ("expected", "output", "found"),
    [("3.4", r"so \boxed{3.4}", True), ("3.4", "3,4", False), ("", "", True), (None, "3.4", None)],
)
def test_a_record_holds_what_it_must(expected: str | None, output: str, found: bool | None) -> None:
    line = record(Prompt("1.1+2.3=?", expected), output, 17, 1.23456789, 0.25)
    assert json.loads(line) == {
        "input": "1.1+2.3=?", "expected_output": expected, "output": output, "tokens": 17,
        "seconds": 1.234568, "ttft_s": 0.25, "found": found,
    }  # fmt: skip


def test_a_record_is_one_line() -> None:
    assert "\n" not in record(Prompt("a\nb"), "c\r\nd\n", 1, 1.0, 1.0)
