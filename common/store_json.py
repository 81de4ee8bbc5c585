"""store.json: writing it, and reading it back with every field checked.

Owns what docs/format.md says about the index. Knows nothing of the files that it points to.
"""

import json
import math
import re
from typing import Any

from common.blocks import BLOCK, code_bytes, scale_count
from common.checksum import checksum
from common.errors import ConfigError, StoreCorruptError, StoreError
from common.families import expected_tensors, is_tied, validate_config
from common.quality import Quality
from common.safetensors_file import DTYPE_BYTES
from common.store_index import (
    CONFIG_FILE,
    FORMAT,
    FORMAT_VERSION,
    MAX_FILE_BYTES,
    RESIDENT_DTYPES,
    WEIGHT_DTYPE,
    FileEntry,
    Index,
    ResidentEntry,
    WeightEntry,
    fingerprint,
    store_dtype,
)

_FILE_NAME = re.compile(r"(weights|residents)-[0-9]{5}-of-[0-9]{5}\.safetensors")
_OTHER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_CHECKSUM = re.compile(r"[0-9a-f]{32}")
_WORD = re.compile(r"[a-z0-9-]{1,32}")


def to_json(index: Index) -> dict[str, Any]:
    """`index` as the object that store.json holds; `parse` is the inverse."""
    data = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": index.fingerprint,
        "source_fingerprint": index.source_fingerprint,
        "dtype": index.dtype,
        "tied": index.tied,
        "block": BLOCK,
        **({} if index.method is None else {"method": index.method}),
        **({} if index.source_format is None else {"source_format": index.source_format}),
        **({} if index.quality is None else {"quality": index.quality.as_json()}),
        "weights": [
            {
                "name": entry.name,
                "shape": list(entry.shape),
                "dtype": WEIGHT_DTYPE,
                "file": entry.file,
                "codes_bytes": entry.codes_bytes,
                "scales_bytes": entry.scales_bytes,
                "codes_checksum": entry.codes_checksum,
                "scales_checksum": entry.scales_checksum,
            }
            for entry in index.weights
        ],
        "residents": [
            {
                "name": entry.name,
                "shape": list(entry.shape),
                "dtype": entry.dtype,
                "file": entry.file,
                "bytes": entry.bytes,
                "checksum": entry.checksum,
            }
            for entry in index.residents
        ],
    }
    if index.files is None:
        return data
    data["files"] = [
        {"name": entry.name, "bytes": entry.bytes, "checksum": entry.checksum}
        for entry in index.files
    ]
    return data | {"checksum": _own_checksum(data)}


def _own_checksum(data: dict[str, Any]) -> str:
    """Of everything that store.json says beside it, also of what this program does not know."""
    rest = {key: value for key, value in data.items() if key != "checksum"}
    return checksum(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def parse(data: dict[str, Any], config: dict[str, Any]) -> Index:
    """Check a parsed store.json against the format and against the model's config.

    Raises StoreError, in one line that does not yet name the directory.
    """
    _require_version(data)
    _require(data, "block", BLOCK)
    try:
        validate_config(config)
    except ConfigError as error:
        raise StoreError(str(error)) from error
    linear, resident_shapes = expected_tensors(config)
    weights = tuple(
        _parse_weight(item, name, shape)
        for item, (name, shape) in _pair(data, "weights", list(linear.items()))
    )
    residents = tuple(
        _parse_resident(item, name, shape)
        for item, (name, shape) in _pair(data, "residents", list(resident_shapes.items()))
    )
    _require(data, "tied", is_tied(config))
    _require(data, "dtype", store_dtype(config, residents[0].dtype))
    source = data.get("source_fingerprint")
    if source is not None and not (isinstance(source, str) and _CHECKSUM.fullmatch(source)):
        raise StoreError("source_fingerprint is neither null nor 32 hexadecimal digits")
    method = _parse_word(data, "method", "absmax")
    source_format = _parse_word(data, "source_format", "gptq")
    _require(data, "fingerprint", fingerprint(config, weights, residents))
    return Index(
        data["fingerprint"], source, data["dtype"], data["tied"], weights, residents, method,
        parse_files(data), source_format, _parse_quality(data),
    )  # fmt: skip


def parse_files(data: dict[str, Any]) -> tuple[FileEntry, ...] | None:
    """The files without tensors that a parsed store.json names; None if it is from before it had them.

    Raises StoreError, StoreCorruptError if store.json is not what was written, as its own checksum tells.
    """
    _require_version(data)
    if "files" not in data and "checksum" not in data:
        return None
    found = data.get("checksum")
    if found != (expected := _own_checksum(data)):
        raise StoreCorruptError(
            f"its own checksum is {expected}, expected {found!r:.40}; the store is damaged, "
            "quantize the checkpoint again"
        )
    items = data.get("files")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise StoreError(f"files is {items!r:.40}, expected a list of objects")
    files = []
    for item in items:
        name, size, found = item.get("name"), item.get("bytes"), item.get("checksum")
        if not isinstance(name, str) or not _OTHER_NAME.fullmatch(name):
            raise StoreError(f"files: name is {name!r:.80}, expected a name such as {CONFIG_FILE}")
        if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES:
            raise StoreError(
                f"files: bytes of {name} is {size!r:.40}, expected a size of at most {MAX_FILE_BYTES}"
            )
        if not isinstance(found, str) or not _CHECKSUM.fullmatch(found):
            raise StoreError(
                f"files: checksum of {name} is {found!r:.40}, expected 32 hexadecimal digits"
            )
        files.append(FileEntry(name, size, found))
    names = [entry.name for entry in files]
    if len(set(names)) != len(names) or CONFIG_FILE not in names:
        raise StoreError(f"files names {len(names)} files, expected each once, {CONFIG_FILE} too")
    return tuple(files)


def _require_version(data: dict[str, Any]) -> None:
    _require(data, "format", FORMAT)
    version = data.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise StoreError(
            f"format_version is {version!r:.40}, this program reads version {FORMAT_VERSION}; "
            "quantize the checkpoint again, or use the release that wrote the store"
        )


def _parse_quality(data: dict[str, Any]) -> Quality | None:
    if data.get("quality") is None:
        return None
    try:
        return Quality.parse(data["quality"])
    except ValueError as error:
        raise StoreError(f"quality: {error}") from error


def _require(data: dict[str, Any], key: str, expected: Any) -> None:
    found = data.get(key)
    if type(found) is not type(expected) or found != expected:
        raise StoreError(f"{key} is {found!r:.40}, expected {expected!r}")


def _parse_word(data: dict[str, Any], key: str, example: str) -> str | None:
    """A short word that may be absent."""
    found = data.get(key)
    if found is not None and not (isinstance(found, str) and _WORD.fullmatch(found)):
        raise StoreError(f"{key} is {found!r:.40}, expected a short word such as {example!r}")
    return found


def _pair(data: dict[str, Any], key: str, expected: list[Any]) -> list[tuple[Any, Any]]:
    items = data.get(key)
    if not isinstance(items, list) or len(items) != len(expected):
        found = f"{len(items)} entries" if isinstance(items, list) else f"{items!r:.40}"
        raise StoreError(f"{key} has {found}, expected {len(expected)} for this config")
    return list(zip(items, expected, strict=True))


def _parse_entry(item: Any, name: str, shape: tuple[int, ...], sums: tuple[str, ...]) -> None:
    """Check what both kinds of entry have: name, shape, file, and the checksums named `sums`."""
    if not isinstance(item, dict):
        raise StoreError(f"the entry of {name} is {item!r:.40}, expected an object")
    if item.get("name") != name:
        raise StoreError(f"an entry is named {item.get('name')!r:.80}, expected {name!r}")
    found = item.get("shape")
    if found != list(shape) or not all(type(size) is int for size in found):
        raise StoreError(f"{name}: shape is {found!r:.40}, expected {list(shape)}")
    file = item.get("file")
    if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
        raise StoreError(f"{name}: file is {file!r:.80}, expected a name such as "
                         "weights-00001-of-00002.safetensors")  # fmt: skip
    for key in sums:
        value = item.get(key)
        if not isinstance(value, str) or not _CHECKSUM.fullmatch(value):
            raise StoreError(f"{name}: {key} is {value!r:.40}, expected 32 hexadecimal digits")


def _parse_size(item: dict[str, Any], key: str, expected: int) -> int:
    if type(item.get(key)) is not int or item[key] != expected:
        raise StoreError(f"{item['name']}: {key} is {item.get(key)!r:.40}, expected {expected}")
    return expected


def _parse_weight(item: Any, name: str, shape: tuple[int, int]) -> WeightEntry:
    _parse_entry(item, name, shape, ("codes_checksum", "scales_checksum"))
    if item.get("dtype") != WEIGHT_DTYPE:
        raise StoreError(f"{name}: dtype is {item.get('dtype')!r:.40}, expected {WEIGHT_DTYPE!r}")
    elements = math.prod(shape)
    codes = _parse_size(item, "codes_bytes", code_bytes(elements))
    scales = _parse_size(item, "scales_bytes", 2 * scale_count(elements))
    return WeightEntry(
        name, shape, item["file"], codes, scales, item["codes_checksum"], item["scales_checksum"]
    )


def _parse_resident(item: Any, name: str, shape: tuple[int, ...]) -> ResidentEntry:
    _parse_entry(item, name, shape, ("checksum",))
    dtype = item.get("dtype")
    if not isinstance(dtype, str) or dtype not in RESIDENT_DTYPES:
        raise StoreError(
            f"{name}: dtype is {dtype!r:.40}, expected one of {', '.join(RESIDENT_DTYPES)}"
        )
    size = _parse_size(item, "bytes", math.prod(shape) * DTYPE_BYTES[dtype])
    return ResidentEntry(name, shape, dtype, size, item["file"], item["checksum"])
