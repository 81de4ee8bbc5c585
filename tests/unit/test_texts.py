"""Text to calibrate by and to measure on: read from files, cut into contexts, refused in one line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import UsageError
from demo import tokenizer
from feeder.texts import Excerpt, Text, read, sample, tokenize
from tests.checkpoints import make_checkpoint

CONFIG: dict[str, Any] = {
    "model_type": "qwen2", "max_position_embeddings": 512, "vocab_size": 320, "num_hidden_layers": 1,
}  # fmt: skip
TOKENS = tokenizer.build()


def written(path: Path, text: str | bytes, name: str = "text.txt") -> Path:
    file = path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def cut(text: str, tokens: int, length: int, config: dict[str, Any] = CONFIG) -> list[list[int]]:
    rows = tokenize(Text("it", (text,)), TOKENS, config, Excerpt(None, tokens, length, True))
    assert rows.tokens == sum(rows.lengths)
    return [row[:count].tolist() for row, count in zip(rows.ids, rows.lengths, strict=True)]


def test_a_text_is_cut_into_contexts() -> None:
    text = "1.1+2.3=? " * 30
    ids = TOKENS(text, add_special_tokens=False)["input_ids"]
    assert cut(text, 10_000, 64) == [ids[at : at + 64] for at in range(0, len(ids), 64)]


def test_part_of_a_text_is_taken_from_all_over_it() -> None:
    text = " ".join(map(str, range(2000)))
    ids = TOKENS(text, add_special_tokens=False)["input_ids"]
    contexts = [ids[at : at + 50] for at in range(0, len(ids), 50)]
    rows = cut(text, 420, 50)
    assert sum(map(len, rows)) == 420 and len(rows) == 9 and len(rows[-1]) == 20
    found = [contexts.index(row) for row in rows[:-1]]
    steps = [after - before for before, after in itertools.pairwise(found)]
    assert found[0] == 0 and max(steps) - min(steps) <= 1
    assert found[-1] > 0.7 * len(contexts)


def test_contexts_fit_the_model_and_its_window() -> None:
    text = "carry " * 600
    assert max(map(len, cut(text, 9999, 2048))) == 512
    window = {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 0}
    assert max(map(len, cut(text, 9999, 2048, CONFIG | window))) == 100
    mistral = CONFIG | {"model_type": "mistral", "sliding_window": 60}
    assert max(map(len, cut(text, 9999, 2048, mistral))) == 60


def test_paragraphs_are_texts_of_their_own(tmp_path: Path) -> None:
    file = written(tmp_path, "one\ntwo\n\n \nthree\n")
    assert read(file, paragraphs=True).documents == ("one\ntwo", "three")
    assert read(file).documents == ("one\ntwo\n\n \nthree\n",)


def test_records_go_through_the_chat_template(tmp_path: Path) -> None:
    records = [{"input": "1+1=?", "expected_output": "2"}, {"input": "2+2=?"}]
    file = written(tmp_path, "\n".join(map(json.dumps, records)), "prompts.jsonl")
    text = read(file)
    assert TOKENS.chat_template
    rows = tokenize(text, TOKENS, CONFIG, Excerpt(file, 999, 64, True))
    said = [TOKENS.decode(row[:count]) for row, count in zip(rows.ids, rows.lengths, strict=True)]
    asked = TOKENS.apply_chat_template(
        [{"role": "user", "content": "2+2=?"}], tokenize=False, add_generation_prompt=True
    )
    assert said[1] == asked
    assert said[0].startswith(asked.replace("2+2", "1+1")) and "2" in said[0][len(asked) :]


def test_the_two_parts_of_the_sample_have_nothing_in_common() -> None:
    measured, calibrating = sample(True).documents[0], sample(False).documents[0]
    assert isinstance(measured, str) and isinstance(calibrating, str)
    assert min(len(measured), len(calibrating)) > 50_000
    both = set(measured.split("\n\n")) & set(calibrating.split("\n\n"))
    assert not {paragraph for paragraph in both if paragraph.strip()}
    # Nor where paragraphs are cut otherwise: hardly a line, but for headings and short examples.
    lines = [line for line in measured.splitlines() if len(line) > 50]
    assert sum(line in calibrating for line in lines) < 0.02 * len(lines)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.txt", b"\xff\xfe", "is not UTF-8"),
        ("text.txt", b"", "fewer than two tokens"),
        ("text.jsonl", b'{"inputs": "a"}', "line 1: expected"),
        ("text.json", b"[", "is not a JSON list"),
    ],
)
def test_what_is_no_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = make_checkpoint(tmp_path / "model", layers=1)
    TOKENS.save_pretrained(path)
    excerpt = Excerpt(written(tmp_path, content, name), 100, 64, True)
    with pytest.raises(UsageError, match=message):
        excerpt.rows(path, CONFIG)


def test_files_and_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    home, config = make_checkpoint(tmp_path / "model", layers=1), CONFIG | {"vocab_size": 100}
    excerpt = Excerpt(written(tmp_path, "1.1+2.3=?"), 100, 64, True)
    with pytest.raises(UsageError, match="has no tokenizer: put its tokenizer.json there"):
        excerpt.rows(home, config)
    written(home, "{}", "tokenizer.json")
    with pytest.raises(UsageError, match="has no tokenizer that can be read"):
        excerpt.rows(home, config)
    TOKENS.save_pretrained(home)
    with pytest.raises(UsageError, match="is it another model's"):
        Excerpt(written(tmp_path, "<|im_end|>" * 9), 100, 64, True).rows(home, config)
    for path, message in ((tmp_path, "Is a directory"), (tmp_path / "x", "No such file")):
        with pytest.raises(UsageError, match=message):
            Excerpt(path, 100, 64, True).rows(home, config)
    with pytest.raises(UsageError, match="expected at least 2"):
        Excerpt(None, 1, 64, True).rows(home, config)
