"""Writing a store: add every tensor, then commit; until then there is no store.

Owns the order of events, the room on the disk, and the index. `common.shard_files` owns the
bytes, `common.partial_directory` the all-or-nothing. Knows nothing of where values come from.

The config says what tensors there will be, so files, headers and offsets are settled at the
start. Tensors may then come in any order, from several threads, and large residents in pieces,
and no more memory is used than the caller holds.
"""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from common.checksum import checksum
from common.config import format_bytes
from common.errors import InternalError, StoreError
from common.families import expected_tensors, is_tied
from common.partial_directory import PartialDirectory
from common.safetensors_file import TensorSpec
from common.shard_files import ShardFiles, refused
from common.store_index import (
    CONFIG_FILE,
    INDEX_FILE,
    MAX_FILE_BYTES,
    FileEntry,
    Index,
    ResidentEntry,
    WeightEntry,
    fingerprint,
    packed_specs,
    store_dtype,
)
from common.store_json import to_json

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 1 << 30
_NO_CHECKSUM = "0" * 32


class StoreWriter:
    """Context manager that writes one store: add everything, then `commit`.

    Leaving it without a commit removes what was written; a process killed at any moment leaves
    no store. `add_weight` and the two ways to add a resident may be called from several threads,
    which must have ended before the context does.
    """

    def __init__(
        self,
        target: Path | str,
        config: Mapping[str, Any],
        resident_dtypes: Mapping[str, str],
        *,
        source_fingerprint: str | None = None,
        copies: Sequence[Path] = (),
        method: str | None = None,
        source_format: str | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Plan a store in the directory `target`, which must not exist.

        config: a validated config. resident_dtypes: "BF16", "F16" or "F32" for the name
        of each resident that the config expects. copies: tokenizer files and the like, to go
        along. method, source_format: how weights were quantized, and what they were made from,
        for the index. A file holds up to
        `shard_bytes`, or one weight or resident that is larger.
        """
        self._directory = PartialDirectory(Path(target))
        self._config = copy.deepcopy(dict(config))  # what others write into theirs is not ours
        self._source_fingerprint = source_fingerprint
        self._copies = tuple(copies)
        self._method = method
        self._source_format = source_format
        self._stack = ExitStack()
        linear, shapes = expected_tensors(self._config)
        residents = [TensorSpec(name, resident_dtypes[name], shapes[name]) for name in shapes]
        self._files = ShardFiles()
        packed = [packed_specs(name, shape) for name, shape in linear.items()]
        self._files.plan("weights", packed, shard_bytes)
        self._files.plan("residents", [[spec] for spec in residents], shard_bytes)
        self._weights = {name: self._blank_weight(name, shape) for name, shape in linear.items()}
        self._residents = {spec.name: self._blank_resident(spec) for spec in residents}
        self._others = {path.name: _blank_copy(path) for path in copies}
        self._others[CONFIG_FILE] = FileEntry(CONFIG_FILE, len(self._config_json()), _NO_CHECKSUM)

    @property
    def needed_bytes(self) -> int:
        """Bytes of all files that the store will have."""
        copies = sum(path.stat().st_size for path in self._copies)
        return self._files.bytes + copies + len(self._config_json()) + len(self._index_json())

    def __enter__(self) -> StoreWriter:
        """Begin. Raises StoreError if the target exists or the disk has no room for it."""
        with ExitStack() as stack:
            stack.enter_context(self._directory)
            self._require_room()
            stack.callback(self._files.close)
            self._files.create(self._directory.path)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def add_weight(
        self, name: str, shape: Sequence[int], codes: torch.Tensor, scales: torch.Tensor
    ) -> None:
        """Write the packed weight `name` of `shape` (N, K).

        codes: uint8 [code_bytes(N * K)], scales: bf16 [scale_count(N * K)], both on the CPU.
        Raises StoreError if the disk refuses, InternalError if the store expects other tensors.
        """
        blank = self._weights.get(name)
        if blank is None or blank.shape != tuple(shape):
            raise InternalError(f"{name} {tuple(shape)} is no weight of this config")
        codes_checksum = self._files.write(f"{name}.codes", [codes])
        scales_checksum = self._files.write(f"{name}.scales", [scales])
        self._weights[name] = replace(
            blank, codes_checksum=codes_checksum, scales_checksum=scales_checksum
        )

    def add_resident(self, name: str, tensor: torch.Tensor) -> None:
        """Write a resident tensor, on the CPU, in its own dtype. Errors as for `add_weight`."""
        self.add_resident_pieces(name, [tensor])

    def add_resident_pieces(self, name: str, pieces: Iterable[torch.Tensor]) -> None:
        """The same for a tensor too large to hold, as pieces in row-major order."""
        if name not in self._residents:
            raise InternalError(f"{name} is no resident of this config")
        checksum = self._files.write(name, pieces)
        self._residents[name] = replace(self._residents[name], checksum=checksum)

    def commit(self) -> None:
        """Finish: everything reaches the disk, then the store appears under its name.

        Raises StoreError if the disk refuses or the target exists by now, InternalError if
        tensors are missing.
        """
        missing = self._files.missing()
        if missing:
            raise InternalError(f"{len(missing)} tensors were not added, {missing[0]} is one")
        for path in self._copies:
            with path.open("rb") as source:
                self._others[path.name] = self._write_new(path.name, source)
        self._others[CONFIG_FILE] = self._write_new(CONFIG_FILE, io.BytesIO(self._config_json()))
        self._write_new(INDEX_FILE, io.BytesIO(self._index_json()))
        self._directory.publish()

    def _write_new(self, name: str, source: BinaryIO) -> FileEntry:
        path, data = self._directory.path / name, source.read()
        try:
            with path.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise refused(path, error) from error
        return FileEntry(name, len(data), checksum(data))

    def _require_room(self) -> None:
        parent = self._directory.target.parent
        needed, free = self.needed_bytes, shutil.disk_usage(parent).free
        if needed > free:
            raise StoreError(
                f"no room on the disk: the store needs {needed} bytes "
                f"({format_bytes(needed)}), {parent} has {free} ({format_bytes(free)}) free; "
                "make room or choose another directory"
            )

    def _blank_weight(self, name: str, shape: tuple[int, int]) -> WeightEntry:
        codes, scales = packed_specs(name, shape)
        file = self._files.file_of(codes.name)
        return WeightEntry(name, shape, file, codes.bytes, scales.bytes, _NO_CHECKSUM, _NO_CHECKSUM)

    def _blank_resident(self, spec: TensorSpec) -> ResidentEntry:
        file = self._files.file_of(spec.name)
        return ResidentEntry(spec.name, spec.shape, spec.dtype, spec.bytes, file, _NO_CHECKSUM)

    def _config_json(self) -> bytes:
        return json.dumps(self._config, indent=2).encode() + b"\n"

    def _index_json(self) -> bytes:
        weights, residents = tuple(self._weights.values()), tuple(self._residents.values())
        index = Index(
            fingerprint=fingerprint(self._config, weights, residents),
            source_fingerprint=self._source_fingerprint,
            dtype=store_dtype(self._config, residents[0].dtype),
            tied=is_tied(self._config),
            weights=weights,
            residents=residents,
            method=self._method,
            files=tuple(self._others.values()),
            source_format=self._source_format,
        )
        return json.dumps(to_json(index), indent=1).encode() + b"\n"


def _blank_copy(path: Path) -> FileEntry:
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise StoreError(
            f"{path} has {size} bytes, expected at most {MAX_FILE_BYTES} of a file that goes along; "
            "is it a tokenizer's?"
        )
    return FileEntry(path.name, size, _NO_CHECKSUM)
