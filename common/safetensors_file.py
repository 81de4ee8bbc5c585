"""The container format of checkpoints and stores: headers of safetensors files.

Owns reading a header strictly, laying a file out before its data exist, and reading bytes at an
offset. Knows nothing of which tensors a model has, and needs no torch.

Why not only the safetensors package: its writer wants a whole file's tensors in memory at once,
and its reader maps the file, so that a file that shrinks later kills the process by a signal.
The format is https://github.com/huggingface/safetensors#format: a header's length as u64 little
endian, the header as JSON, padded with spaces, then the data without holes.
"""

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from common.errors import WeightFeederError
from common.strict_json import parse_object

_DTYPES_OF_WIDTH = {
    1: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"),
    2: ("U16", "I16", "F16", "BF16"),
    4: ("U32", "I32", "F32"),
    8: ("U64", "I64", "F64"),
}
DTYPE_BYTES = {dtype: width for width, dtypes in _DTYPES_OF_WIDTH.items() for dtype in dtypes}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
MAX_DIMENSIONS = 8
METADATA = {"format": "pt"}  # what this project's own files say of themselves
_ALIGNMENT = 8


class SafetensorsError(WeightFeederError):
    """A file is missing, truncated or malformed; the message names it, the caller adds advice."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, safetensors dtype ("BF16", "U8", ...) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Header:
    """What a file holds: its tensors, where each one's bytes begin, counted from 0, and what it says of
    itself."""

    tensors: dict[str, TensorSpec]
    offsets: dict[str, int]
    file_bytes: int
    metadata: dict[str, str] = field(default_factory=dict)


def layout(specs: Sequence[TensorSpec]) -> tuple[bytes, Header]:
    """Lay out a file of these tensors: the bytes it begins with, and where the data will go.

    The widest dtypes come first, so that each tensor is aligned to its own element.
    """
    ordered = sorted(specs, key=lambda spec: -DTYPE_BYTES[spec.dtype])
    entries: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for spec in ordered:
        span = [end, end + spec.bytes]
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": span}
        end += spec.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = 8 + len(text)
    offsets = {spec.name: start + entries[spec.name]["data_offsets"][0] for spec in ordered}
    header = Header({spec.name: spec for spec in ordered}, offsets, start + end, METADATA)
    return struct.pack("<Q", len(text)) + text, header


def read_header(path: Path) -> Header:
    """Read and check a file's header: known dtypes, no holes, no bytes missing or left over.

    Raises SafetensorsError, in one line that names the file.
    """
    try:
        if not path.is_file():
            found = "is not a regular file" if path.exists() else "is missing"
            raise SafetensorsError(f"{path} {found}, expected a safetensors file")
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if file_bytes < 8 + length <= 8 + MAX_HEADER_BYTES:
                raise SafetensorsError(
                    f"{path} is truncated: it has {file_bytes} bytes, its header alone takes "
                    f"{8 + length}"
                )
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise SafetensorsError(
                    f"{path} is no safetensors file: its first 8 bytes say that the header "
                    f"takes {length} bytes, expected 2 to {MAX_HEADER_BYTES}"
                )
            text = file.read(length)
    except OSError as error:
        raise SafetensorsError(f"{path} cannot be read: {error.strerror}") from error
    try:
        header = _parse_header(parse_object(text), 8 + length)
    except ValueError as error:
        raise SafetensorsError(f"{path}: its header is malformed: {error}") from error
    if header.file_bytes != file_bytes:
        kind = "is truncated" if file_bytes < header.file_bytes else "has bytes left over"
        raise SafetensorsError(
            f"{path} {kind}: it has {file_bytes} bytes, its header promises {header.file_bytes}"
        )
    return header


def _parse_header(entries: dict[str, Any], start: int) -> Header:
    """Check a parsed header whose data begin at byte `start`; ValueError says what is wrong."""
    tensors: dict[str, TensorSpec] = {}
    spans: list[tuple[int, int]] = []
    offsets: dict[str, int] = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
                raise ValueError(f"__metadata__ is {entry!r:.40}, expected texts")
            continue
        spec, begin, end = _parse_entry(name, entry)
        tensors[name], offsets[name] = spec, start + begin
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError(f"data begin at {begin}, expected {position}: a hole or an overlap")
        position = end
    return Header(tensors, offsets, start + position, entries.get("__metadata__", {}))


def _parse_entry(name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    if not isinstance(entry, dict):
        raise ValueError(f"tensor {name!r:.120} is described by {entry!r:.40}, expected an object")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {name!r:.120} has the unknown dtype {dtype!r:.40}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS or not _is_sizes(span) or len(span) != 2:
        raise ValueError(
            f"tensor {name!r:.120} lacks a shape or two data_offsets of sane whole numbers"
        )
    spec = TensorSpec(name, dtype, tuple(shape))
    if span[1] - span[0] != spec.bytes:
        raise ValueError(
            f"tensor {name!r:.120} has {span[1] - span[0]} bytes, expected {spec.bytes} for "
            f"{dtype} {list(shape)}"
        )
    return spec, span[0], span[1]


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size < 1 << 63 for size in value
    )
