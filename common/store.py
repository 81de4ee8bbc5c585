"""A store: the INT4 model on disk, complete by itself. docs/format.md describes it by the byte.

Owns opening a store and reading its tensors. `common.store_json` owns the index,
`common.store_writer` the writing. Knows nothing of where the bytes go. Opening needs no torch,
only reading does.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import store_json
from common.checksum import checksum
from common.errors import StoreCorruptError, StoreError
from common.quality import Quality
from common.safetensors_file import Header, SafetensorsError, TensorSpec, read_header
from common.store_index import (
    CONFIG_FILE,
    FORMAT_VERSION,
    INDEX_FILE,
    Index,
    ResidentEntry,
    WeightEntry,
    packed_specs,
)
from common.store_writer import StoreWriter
from common.strict_json import read_object

if TYPE_CHECKING:
    import torch

READ_BYTES = 8 << 20  # at once: between two reads a thread can be told to stop

__all__ = [
    "FORMAT_VERSION",
    "ResidentEntry",
    "Store",
    "StoreWriter",
    "WeightEntry",
    "checksum",
]


@dataclass(frozen=True)
class Store:
    """An opened store. Its metadata were checked; its tensors' bytes are not, until `check`.

    Reading is thread-safe. The tensors read are views of mapped files: they cost no memory of
    their own, stay valid after `close`, and must not be written to.
    """

    path: Path
    format_version: int
    fingerprint: str
    source_fingerprint: str | None
    dtype: str
    tied: bool
    config: dict[str, Any]
    weights: tuple[WeightEntry, ...]
    residents: tuple[ResidentEntry, ...]
    method: str | None = None  # how the weights were quantized, if the index says so
    quality: Quality | None = None  # against the original, if it was measured
    _handles: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    _fds: dict[str, int] = field(default_factory=dict, repr=False, compare=False)
    _offsets: dict[str, int] = field(default_factory=dict, repr=False, compare=False)  # by tensor
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path | str) -> Store:
        """Open the store in the directory `path` and check it against its format.

        Checked are the index, the config, and every file's header and size. Raises StoreError,
        in one line, if anything is missing, malformed, of another version or inconsistent.
        """
        path = Path(path)
        if not path.is_dir():
            raise StoreError(f"{path} is not a directory, expected a store")
        if not (path / INDEX_FILE).exists():
            raise StoreError(
                f"{path} has no {INDEX_FILE}, so it is not a store; make one with: "
                "python -m feeder.quantize MODEL_DIR STORE_DIR"
            )
        config = _read_json(path / CONFIG_FILE)
        try:
            index = store_json.parse(_read_json(path / INDEX_FILE), config)
        except StoreError as error:
            raise StoreError(f"{path / INDEX_FILE}: {error}") from error
        _check_files(path, index)
        return cls(
            path=path,
            format_version=FORMAT_VERSION,
            fingerprint=index.fingerprint,
            source_fingerprint=index.source_fingerprint,
            dtype=index.dtype,
            tied=index.tied,
            config=config,
            weights=index.weights,
            residents=index.residents,
            method=index.method,
            quality=index.quality,
        )

    @property
    def packed_bytes(self) -> int:
        """Bytes of all weights, packed."""
        return sum(entry.packed_bytes for entry in self.weights)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all residents."""
        return sum(entry.bytes for entry in self.residents)

    def read_weight(self, entry: WeightEntry) -> tuple[torch.Tensor, torch.Tensor]:
        """A weight's codes, uint8 [codes_bytes], and scales, bf16 [scales_bytes / 2]; no copy.

        Raises StoreError if the file can no longer be read.
        """
        codes = self._read(entry.file, f"{entry.name}.codes")
        return codes, self._read(entry.file, f"{entry.name}.scales")

    def read_weight_into(
        self,
        entry: WeightEntry,
        codes: torch.Tensor,
        scales: torch.Tensor,
        stop: threading.Event | None = None,
    ) -> None:
        """Read a weight's bytes straight into ``codes`` and ``scales``, uint8 on the CPU, each of the
        entry's length. Any thread may, and no two wait for each other. Raises StoreError; also as
        soon as ``stop`` is set."""
        self._read_into(entry.file, f"{entry.name}.codes", codes, stop)
        self._read_into(entry.file, f"{entry.name}.scales", scales, stop)

    def read_resident(self, entry: ResidentEntry) -> torch.Tensor:
        """A resident tensor in its own shape and dtype; no copy. Raises StoreError."""
        return self._read(entry.file, entry.name)

    def check(self, entry: WeightEntry, codes: Any, scales: Any) -> None:
        """Raise StoreCorruptError unless `codes` and `scales` are the bytes that were written.

        Both are CPU tensors or buffers of bytes, wherever they lie by now.
        """
        self._compare(entry.file, f"{entry.name}.codes", entry.codes_checksum, codes)
        self._compare(entry.file, f"{entry.name}.scales", entry.scales_checksum, scales)

    def check_resident(self, entry: ResidentEntry, tensor: Any) -> None:
        """Raise StoreCorruptError unless `tensor` holds the bytes that were written."""
        self._compare(entry.file, entry.name, entry.checksum, tensor)

    def close(self) -> None:
        """Forget the open files; each mapping lasts as long as a tensor that views it."""
        with self._lock:
            self._handles.clear()
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()

    def _compare(self, file: str, name: str, expected: str, data: Any) -> None:
        found = checksum(data)
        if found != expected:
            raise StoreCorruptError(
                f"{self.path / file}: the checksum of {name} is {found}, expected {expected}; "
                "the store is damaged, quantize the checkpoint again"
            )

    def _read(self, file: str, name: str) -> torch.Tensor:
        try:
            return self._handle(file).get_tensor(name)
        except Exception as error:  # safetensors raises its own type and several built-in ones
            raise StoreError(f"{self.path / file}: cannot read {name}: {error}") from error

    def _read_into(
        self, file: str, name: str, destination: torch.Tensor, stop: threading.Event | None
    ) -> None:
        view = destination.numpy().data
        try:
            with self._lock:
                if file not in self._fds:
                    self._offsets.update(read_header(self.path / file).offsets)
                    self._fds[file] = os.open(self.path / file, os.O_RDONLY | os.O_CLOEXEC)
            fd, at = self._fds[file], self._offsets[name]
            while view:
                if stop is not None and stop.is_set():
                    raise OSError(0, "reading was stopped")
                got = os.preadv(fd, [view[:READ_BYTES]], at)
                if not got:
                    raise OSError(0, "the file has become shorter")
                view, at = view[got:], at + got
        except (OSError, SafetensorsError, KeyError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StoreError(f"{self.path / file}: cannot read {name}: {reason}") from error

    def _handle(self, file: str) -> Any:
        from safetensors import safe_open

        with self._lock:
            if file not in self._handles:
                self._handles[file] = safe_open(self.path / file, framework="pt").__enter__()
            return self._handles[file]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except ValueError as error:
        raise StoreError(f"{path}: {error}") from error


def _check_files(path: Path, index: Index) -> None:
    """Check that the files hold exactly the tensors that the index names."""
    expected: dict[str, list[TensorSpec]] = {}
    for weight in index.weights:
        expected.setdefault(weight.file, []).extend(packed_specs(weight.name, weight.shape))
    for entry in index.residents:
        spec = TensorSpec(entry.name, entry.dtype, entry.shape)
        expected.setdefault(entry.file, []).append(spec)
    for file, specs in expected.items():
        try:
            header = read_header(path / file)
        except SafetensorsError as error:
            raise StoreError(f"{error}; quantize the checkpoint again") from error
        _check_header(path / file, header, specs)


def _check_header(path: Path, header: Header, specs: list[TensorSpec]) -> None:
    for spec in specs:
        found = header.tensors.get(spec.name)
        if found != spec:
            what = f"{found.dtype} {list(found.shape)}" if found else "missing"
            raise StoreError(
                f"{path}: {spec.name} is {what}, expected {spec.dtype} {list(spec.shape)}"
            )
    if len(header.tensors) != len(specs):
        extra = sorted(header.tensors.keys() - {spec.name for spec in specs})
        raise StoreError(f"{path}: holds {extra[0]!r:.80}, which store.json does not name")
