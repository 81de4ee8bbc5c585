"""A store: the INT4 model on disk, complete by itself. docs/format.md describes it by the byte.

Owns reading a store's tensors. `common.store_check` owns what is checked first, `common.store_json` the
index, `common.store_writer` the writing. Knows nothing of where the bytes go. Opening needs no torch,
only reading does.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.checksum import checksum
from common.errors import StoreCorruptError, StoreError
from common.quality import Quality
from common.safetensors_file import SafetensorsError, read_header
from common.store_check import read_checked
from common.store_index import FORMAT_VERSION, ResidentEntry, WeightEntry
from common.store_writer import StoreWriter

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
    source_format: str | None = None  # what they were made from, if it says so
    quality: Quality | None = None  # against the original, if it was measured
    _handles: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    _fds: dict[str, int] = field(default_factory=dict, repr=False, compare=False)
    _offsets: dict[str, int] = field(default_factory=dict, repr=False, compare=False)  # by tensor
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path | str) -> Store:
        """Open the store in the directory `path` and check it against its format.

        Checked are the index, the config, every file's header and size, and the checksums of the
        files that hold no tensors. Raises StoreError, in one line, if anything is missing,
        malformed, of another version or inconsistent, or if a link leads out of the directory.
        """
        path = Path(path)
        index, config = read_checked(path)
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
            source_format=index.source_format,
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
