"""The safetensors files of a store being written: every byte has its place from the start.

Owns spreading tensors over files, and writing their bytes from any thread, in any order, in
pieces. Knows nothing of weights, configs or the index.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from common.checksum import as_bytes
from common.errors import InternalError, StoreError
from common.safetensors_file import TensorSpec, layout

if TYPE_CHECKING:
    import torch

_TORCH_DTYPES = {
    "torch.uint8": "U8",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.float32": "F32",
}


class ShardFiles:
    """The files of one store: `plan` all of them, `create`, `write` each tensor once, `close`."""

    def __init__(self) -> None:
        self._specs: dict[str, TensorSpec] = {}
        self._offsets: dict[str, int] = {}
        self._file_of: dict[str, str] = {}
        self._headers: dict[str, bytes] = {}
        self._missing: dict[str, set[str]] = {}
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()
        self._directory = Path()
        self.bytes = 0  # of all files

    def plan(self, prefix: str, groups: Sequence[list[TensorSpec]], shard_bytes: int) -> None:
        """Spread groups of tensors, in order, over files of up to `shard_bytes` of data.

        A group stays in one file, even if it is larger than that.
        """
        shards: list[list[TensorSpec]] = []
        room = 0
        for group in groups:
            size = sum(spec.bytes for spec in group)
            if not shards or size > room:
                shards.append([])
                room = shard_bytes
            shards[-1].extend(group)
            room -= size
        for number, specs in enumerate(shards, start=1):
            file = f"{prefix}-{number:05d}-of-{len(shards):05d}.safetensors"
            self._headers[file], header = layout(specs)
            self._offsets |= header.offsets
            self._specs |= header.tensors
            self._file_of |= dict.fromkeys(header.tensors, file)
            self._missing[file] = set(header.tensors)
            self.bytes += header.file_bytes

    def create(self, directory: Path) -> None:
        """Create the files in `directory`, with their headers. Raises StoreError."""
        self._directory = directory
        for file, header in self._headers.items():
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                self._fds[file] = os.open(directory / file, flags, 0o666)
            except OSError as error:
                raise refused(directory / file, error) from error
            self._pwrite(file, header, 0)

    def file_of(self, name: str) -> str:
        """The file that the tensor `name` lies in."""
        return self._file_of[name]

    def write(self, name: str, pieces: Iterable[torch.Tensor]) -> str:
        """Write a tensor, on the CPU, as pieces in row-major order; returns its checksum.

        Raises StoreError if the disk refuses, InternalError if dtype or size is not as planned
        or the tensor was written before.
        """
        spec, file = self._specs[name], self._file_of[name]
        state, written = xxhash.xxh3_128(), 0
        for piece in pieces:
            data = as_bytes(piece)
            written += len(data)
            dtype = _TORCH_DTYPES.get(str(piece.dtype))
            if dtype != spec.dtype or written > spec.bytes:
                raise InternalError(
                    f"{name}: found {written} bytes of {piece.dtype}, "
                    f"expected {spec.bytes} of {spec.dtype}"
                )
            state.update(data)
            self._pwrite(file, data, self._offsets[name] + written - len(data))
        if written != spec.bytes:
            raise InternalError(f"{name}: found {written} bytes, expected {spec.bytes}")
        self._mark_written(name, file)
        return state.hexdigest()

    def missing(self) -> list[str]:
        """Names of the tensors that were not written yet."""
        return sorted(name for names in self._missing.values() for name in names)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _mark_written(self, name: str, file: str) -> None:
        with self._lock:
            if name not in self._missing[file]:
                raise InternalError(f"{name} was added twice")
            self._missing[file].remove(name)
            complete = not self._missing[file]
        if complete:  # sync each file as it fills: it bounds dirty pages and the wait at the end
            try:
                os.fsync(self._fds[file])
            except OSError as error:
                raise refused(self._directory / file, error) from error

    def _pwrite(self, file: str, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._fds[file], view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise refused(self._directory / file, error) from error


def refused(path: Path, error: OSError) -> StoreError:
    """The error for a file that could not be written."""
    return StoreError(
        f"cannot write {path}: {error.strerror}; make room or choose another directory"
    )
