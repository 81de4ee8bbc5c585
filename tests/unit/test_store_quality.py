"""Measured figures in a store's index: written whole, read back, refused if they cannot be any."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import StoreError
from common.quality import Quality
from common.store import Store
from common.store_quality import record_quality
from feeder.control import table
from tests.stores import write_store

QUALITY = Quality(
    kl_mean=0.00163, kl_p99=0.0055, perplexity=124.8, perplexity_original=124.7,
    top1_agreement=0.941, tokens=8192, text="held-out.txt", text_checksum="0" * 32,
)  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store")


def test_figures_are_added_and_replaced_and_nothing_else_changes(path: Path) -> None:
    before, files = Store.open(path), sorted(os.listdir(path))
    assert before.quality is None
    for quality in (QUALITY, replace(QUALITY, kl_mean=0.0, tokens=1)):
        record_quality(path, quality)
        after = Store.open(path)
        assert after.quality == quality
        assert replace(after, quality=None) == before
        assert sorted(os.listdir(path)) == files


def test_in_words() -> None:
    assert str(QUALITY) == (
        "KL 0.0016 (99th percentile 0.0055), perplexity 124.8 (original 124.7),"
        " agreement 94.1 % on 8192 tokens of held-out.txt"
    )


def edited(path: Path, quality: Any) -> Path:
    file = path / "store.json"
    # A checksum of the index by itself would be found wrong first.
    kept = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("files", "checksum")}
    file.write_text(json.dumps(kept | {"quality": quality}))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_mean": "0.1"}, "kl_mean is '0.1', expected a number"),
        ({"kl_mean": True}, "kl_mean is True"),
        ({"kl_p99": -0.5}, "kl_p99 is -0.5, expected a finite number from 0 up"),
        ({"perplexity": 1e305}, "perplexity is 1e+305"),
        ({"perplexity_original": -1.0}, "perplexity_original is -1.0"),
        ({"top1_agreement": 1.5}, "top1_agreement is 1.5, expected 1 at most"),
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": 3.5}, "tokens is 3.5"),
        ({"text": "a\nb"}, "expected a name"),
        ({"text": "x" * 500}, "expected a name"),
        ({"text_checksum": "x"}, "expected 32 hexadecimal digits"),
    ],
)
def test_what_cannot_be_figures_is_refused(
    path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(StoreError, match="quality: ") as caught:
        Store.open(edited(path, QUALITY.as_json() | change))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_object_or_lacks_a_figure_is_refused(path: Path) -> None:
    for bad in ([], 3, {"kl_mean": 0.1}):
        with pytest.raises(StoreError, match="quality: found .*expected an object with kl_mean"):
            Store.open(edited(path, bad))
    assert Store.open(edited(path, None)).quality is None
    assert Store.open(edited(path, QUALITY.as_json() | {"later": 1})).quality == QUALITY


def test_a_store_that_is_none_or_cannot_be_written(path: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a directory"):
        record_quality(tmp_path / "nothing", QUALITY)
    content = (path / "store.json").read_text()
    (path / f".store.json.partial-{os.getpid()}").write_text("in the way")
    with pytest.raises(StoreError, match="File exists"):
        record_quality(path, QUALITY)
    assert (path / "store.json").read_text() == content


def test_status_shows_it() -> None:
    numbers = (
        "pid", "weights", "packed_bytes", "slots", "arena_bytes", "slots_filling", "slots_ready",
        "slots_in_use", "slots_revoked", "standing", "hit_rate", "passes", "link_bytes_per_s",
        "streamed_bytes", "fills",
    )  # fmt: skip
    words = ("dtype", "device", "store", "fingerprint", "strategy", "cache")
    fields: dict[str, Any] = dict.fromkeys(numbers, 0) | dict.fromkeys(words, "it")
    assert not any(line.startswith("quality") for line in table(fields))
    said = table(fields | {"method": "gptq", "quality": str(QUALITY)})
    assert f"quality   gptq: {QUALITY}" in said
