"""What a store holds: its entries, the names of its files, its fingerprint.

Owns the vocabulary that reading and writing share. Knows nothing of JSON (`common.store_json`)
or of bytes on disk, and needs no torch: a launcher may look at a store without loading any.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from common.blocks import code_bytes, scale_count
from common.families import model_dtype
from common.quality import Quality
from common.safetensors_file import TensorSpec

FORMAT = "weight-feeder"
FORMAT_VERSION = 1
INDEX_FILE = "store.json"
CONFIG_FILE = "config.json"
WEIGHT_DTYPE = "INT4"
MAX_FILE_BYTES = (
    256 << 20
)  # of a file without tensors: it is read whole, before its checksum is known
RESIDENT_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class WeightEntry:
    """One Linear's weight: (N, K) values, packed as codes and scales in one file."""

    name: str
    shape: tuple[int, int]
    file: str
    codes_bytes: int
    scales_bytes: int
    codes_checksum: str
    scales_checksum: str

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def packed_bytes(self) -> int:
        return self.codes_bytes + self.scales_bytes


@dataclass(frozen=True)
class ResidentEntry:
    """One tensor kept as it was in the checkpoint: embedding, norm or bias."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    file: str
    checksum: str


@dataclass(frozen=True)
class FileEntry:
    """A file of the store that holds no tensors: the config, the tokenizer's, and the like."""

    name: str
    bytes: int
    checksum: str


@dataclass(frozen=True)
class Index:
    """Everything that store.json says. ``files``: None in an index from before there was such a list."""

    fingerprint: str
    source_fingerprint: str | None
    dtype: str
    tied: bool
    weights: tuple[WeightEntry, ...]
    residents: tuple[ResidentEntry, ...]
    method: str | None = None
    files: tuple[FileEntry, ...] | None = None
    source_format: str | None = None
    quality: Quality | None = None


def packed_specs(name: str, shape: tuple[int, int]) -> list[TensorSpec]:
    """The two tensors that a weight of shape (N, K) is on disk: `NAME.codes`, `NAME.scales`."""
    elements = shape[0] * shape[1]
    return [
        TensorSpec(f"{name}.codes", "U8", (code_bytes(elements),)),
        TensorSpec(f"{name}.scales", "BF16", (scale_count(elements),)),
    ]


def fingerprint(
    config: dict[str, Any], weights: Sequence[WeightEntry], residents: Sequence[ResidentEntry]
) -> str:
    """What identifies a store's content: config, names, shapes, dtypes and checksums.

    Independent of how the tensors are spread over files. Returns 32 hexadecimal digits.
    """
    content = {
        "config": config,
        "weights": [
            [w.name, list(w.shape), WEIGHT_DTYPE, w.codes_checksum, w.scales_checksum]
            for w in weights
        ],
        "residents": sorted([r.name, list(r.shape), r.dtype, r.checksum] for r in residents),
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def store_dtype(config: dict[str, Any], embedding_dtype: str) -> str:
    """The model's dtype: the config's if it names one, else that of the embedding ("BF16", ...)."""
    return model_dtype(config) or RESIDENT_DTYPES[embedding_dtype]
