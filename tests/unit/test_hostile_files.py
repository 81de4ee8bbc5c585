"""Headers and JSON that nobody writes by accident: refused in one clause, before anything is made of it."""

from __future__ import annotations

import json
import os
import struct
import threading
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint_fingerprint import checkpoint_fingerprint
from common.errors import CheckpointError
from common.inside import leads_outside
from common.safetensors_file import SafetensorsError, read_header
from common.strict_json import MAX_DEPTH, parse_object

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "U8", "shape": [], "data_offsets": [24, 25]},
}


def write(path: Path, header: Any, data_bytes: int = 25, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)
    os.truncate(path, 8 + len(text) + data_bytes)
    return path


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return GOOD | {name: GOOD[name] | fields}


def test_a_good_header(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "x", GOOD | {"__metadata__": {"format": "np"}}))
    assert (header.tensors["a"].shape, header.tensors["b"].bytes) == ((2, 3), 1)
    assert header.metadata == {"format": "np"}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (changed("b", data_offsets=[23, 24]), "data begin at 23, expected 24: a hole or an overlap"),
        (changed("b", data_offsets=[0, 1]), "data begin at 0, expected 1: a hole or an overlap"),
        (changed("b", data_offsets=[25, 26]), "data begin at 25, expected 24: a hole or an overlap"),
        (changed("a", data_offsets=[-24, 0]), "tensor 'a' lacks a shape or two data_offsets of sane"),
        (changed("a", data_offsets=[24, 0]), "tensor 'a' has -24 bytes, expected 24 for F32 [2, 3]"),
        (changed("a", data_offsets=[0, 24.0]), "tensor 'a' lacks a shape or two data_offsets"),
        (changed("a", data_offsets=[0]), "tensor 'a' lacks a shape or two data_offsets"),
        (changed("a", shape=[-2, -3]), "tensor 'a' lacks a shape"),
        (changed("a", shape=[True, 6]), "tensor 'a' lacks a shape"),
        (changed("a", shape=[2**62, 2**62]), "tensor 'a' has 24 bytes, expected 8507059173023461586"),
        (changed("a", shape=[2**62] * 100_000), "tensor 'a' lacks a shape"),
        (changed("a", shape=[10**40]), "the number 10000000000000000000..., which is too large"),
        (changed("a", dtype="F4"), "tensor 'a' has the unknown dtype 'F4'"),
        (changed("a", dtype=["F32"]), "tensor 'a' has the unknown dtype ['F32']"),
        (GOOD | {"a" * 9999: 3}, "aaa"),
        (GOOD | {"__metadata__": {"format": 1}}, "__metadata__ is {'format': 1}, expected texts"),
        (GOOD | {"__metadata__": ["pt"]}, "__metadata__ is ['pt'], expected texts"),
        (b'{"a": {}, "a": {}}', "the key 'a' twice in one object"),
        (b'{"a": {"dtype": "U8", "dtype": "I8"}}', "the key 'dtype' twice in one object"),
        (b"{}" + b"\0" * 6, "not valid JSON"),
        (b"[" * 50_000, "nested too deeply"),
    ],
)  # fmt: skip
def test_hostile_headers_are_refused(tmp_path: Path, header: Any, message: str) -> None:
    path = write(tmp_path / "x.safetensors", header)
    with pytest.raises(SafetensorsError) as caught:
        read_header(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: its header is malformed: ") and message in text
    assert text.splitlines() == [text] and len(text) < len(str(path)) + 300


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "its first 8 bytes say that the header takes 0 bytes, expected 2 to 100000000"),
        (2**64 - 1, "say that the header takes 18446744073709551615 bytes, expected 2 to"),
        (100_000_001, "say that the header takes 100000001 bytes, expected 2 to 100000000"),
        (100_000_000, "is truncated: it has"),
    ],
)
def test_a_header_longer_than_its_file_is_not_read(
    tmp_path: Path, length: int, message: str
) -> None:
    with pytest.raises(SafetensorsError, match=message):
        read_header(write(tmp_path / "x", GOOD, length=length))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": NaN}', "the number NaN, which JSON does not have"),
        (b'{"a": -Infinity}', "the number -Infinity, which JSON does not have"),
        (b'{"a": 1e999}', "the number 1e999, which is too large"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "the number 10000000000000000000..., which is too large"),
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', "the key 'b' twice in one object"),
        (b'{"a\\n": 1, "a\\u000a": 1}', r"the key 'a\n' twice in one object"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
        (b'{"a": "\xff"}', "not UTF-8 text"),
        (b"[1]", "a JSON list, expected an object"),
        (b'{"a": ' * 900 + b"1" + b"}" * 900, "nested too deeply"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "nested too deeply"),
    ],
)
def test_json_that_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_object(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 120


def test_json_that_is_not() -> None:
    inner = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    text = (
        f'{{"a": {inner}, "b": -12345678901234567890123456789, "c": 1e-300, "d": "\\ud83d\\ude00"}}'
    )
    assert parse_object(text.encode()) == json.loads(text)


def test_links_inside_and_outside(tmp_path: Path) -> None:
    model, blobs = tmp_path / "models" / "snapshots" / "1", tmp_path / "models" / "blobs"
    for directory in (model, blobs, tmp_path / "blobs"):
        directory.mkdir(parents=True)
        (directory / "file").touch()
    (model / "within").symlink_to("file")
    (model / "blob").symlink_to("../../blobs/file")
    (model / "out").symlink_to("../../../blobs/file")
    (model / "loop").symlink_to("loop")
    (tmp_path / "alias").symlink_to(model)  # the directory itself may be reached by any way
    for root in (model, tmp_path / "alias"):
        for name in ("file", "within", "blob", "loop", "not there"):
            assert leads_outside(root, root / name) is None, name
        assert leads_outside(root, root / "out") == str(tmp_path / "blobs" / "file")
        assert leads_outside(root, root / ".." / ".." / ".." / "x") == str(tmp_path / "x")


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "model.safetensors")
    found: list[BaseException] = []

    def identify() -> None:
        try:
            checkpoint_fingerprint(tmp_path)
        except CheckpointError as error:
            found.append(error)

    thread = threading.Thread(target=identify, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert "is not a regular file" in str(found[0])
