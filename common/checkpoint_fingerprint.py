"""Tell a checkpoint from another quickly, so that a store made from it can be used again.

Owns what counts as the same checkpoint. Knows nothing of what the tensors mean.

Small files count by all their bytes. Reading a 65 GB checkpoint takes a minute, so a large file
counts by name, size, header, time of change and some of its pages.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import xxhash

from common.checkpoint import INDEX_FILE, companion_files, weight_files
from common.checkpoint_kind import gguf_files
from common.errors import CheckpointError
from common.safetensors_file import MAX_HEADER_BYTES
from common.store_index import CONFIG_FILE, FORMAT_VERSION

WHOLE_FILE_BYTES = 64 << 20
_SETTINGS = (
    "quantize_config.json",
    "quant_config.json",
)  # how a ready-made checkpoint was quantized
_SAMPLES = 256
_SAMPLE_BYTES = 4096


def checkpoint_fingerprint(model_dir: Path | str) -> str:
    """Identify a checkpoint, a directory or a GGUF file; returns 32 hexadecimal digits.

    It also covers the version of the store's format, for a store of another version is of no
    use. Raises CheckpointError if there is no checkpoint or it cannot be read.
    """
    path = Path(model_dir)
    state = xxhash.xxh3_128(struct.pack("<Q", FORMAT_VERSION))
    try:
        for file in _files(path):
            _add_file(state, file)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: {error.strerror}, expected a readable checkpoint"
        ) from error
    return state.hexdigest()


def _files(path: Path) -> list[Path]:
    """All that a store is made of."""
    gguf = gguf_files(path)
    if gguf:
        return [*gguf, *(companion_files(path) if path.is_dir() else ())]
    files = [path / CONFIG_FILE, *companion_files(path), *weight_files(path)]
    others = (path / name for name in (INDEX_FILE, *_SETTINGS))
    return [*files, *(other for other in others if other.exists())]


def _add_file(state: xxhash.xxh3_128, path: Path) -> None:
    if path.exists() and not path.is_file():  # opening a FIFO would block for ever
        raise CheckpointError(f"{path} is not a regular file, expected one")
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        name = os.fsencode(path.name)
        state.update(struct.pack("<QQ", len(name), status.st_size) + name)
        if status.st_size <= WHOLE_FILE_BYTES:
            state.update(file.read())
            return
        state.update(struct.pack("<q", status.st_mtime_ns))
        # A safetensors file begins with its header's length; others count by as much.
        header_bytes = min(struct.unpack("<Q", file.read(8))[0], MAX_HEADER_BYTES)
        state.update(file.read(header_bytes))
        for sample in range(_SAMPLES):
            file.seek((status.st_size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            state.update(file.read(_SAMPLE_BYTES))
