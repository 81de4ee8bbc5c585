"""store.json: writing it, and reading it back with every field checked.

Owns what docs/format.md says about the index. Knows nothing of the files that it points to.
"""

import math
import re
from typing import Any

from common.blocks import BLOCK, code_bytes, scale_count
from common.errors import ConfigError, StoreError
from common.quality import Quality
from common.qwen2 import expected_tensors, is_tied, validate_config
from common.safetensors_file import DTYPE_BYTES
from common.store_index import (
    FORMAT,
    FORMAT_VERSION,
    RESIDENT_DTYPES,
    WEIGHT_DTYPE,
    Index,
    ResidentEntry,
    WeightEntry,
    fingerprint,
    store_dtype,
)

_FILE_NAME = re.compile(r"(weights|residents)-[0-9]{5}-of-[0-9]{5}\.safetensors")
_CHECKSUM = re.compile(r"[0-9a-f]{32}")
_METHOD = re.compile(r"[a-z0-9-]{1,32}")


def to_json(index: Index) -> dict[str, Any]:
    """`index` as the object that store.json holds; `parse` is the inverse."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": index.fingerprint,
        "source_fingerprint": index.source_fingerprint,
        "dtype": index.dtype,
        "tied": index.tied,
        "block": BLOCK,
        **({} if index.method is None else {"method": index.method}),
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


def parse(data: dict[str, Any], config: dict[str, Any]) -> Index:
    """Check a parsed store.json against the format and against the model's config.

    Raises StoreError, in one line that does not yet name the directory.
    """
    _require(data, "format", FORMAT)
    version = data.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise StoreError(
            f"format_version is {version!r:.40}, this program reads version {FORMAT_VERSION}; "
            "quantize the checkpoint again, or use the release that wrote the store"
        )
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
    method = data.get("method")
    if method is not None and not (isinstance(method, str) and _METHOD.fullmatch(method)):
        raise StoreError(f"method is {method!r:.40}, expected a short word such as 'absmax'")
    _require(data, "fingerprint", fingerprint(config, weights, residents))
    return Index(
        data["fingerprint"], source, data["dtype"], data["tied"], weights, residents, method,
        _parse_quality(data),
    )  # fmt: skip


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
