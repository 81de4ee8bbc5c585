"""Whether a directory is a store, whole and as it was written: what is checked before a tensor is read.

Owns the order of these checks, which is such that damage is found where it is: the index by its own
checksum, then the files without tensors, then what the index says, then the headers of the others.
Knows nothing of reading tensors, and needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import store_json
from common.checksum import checksum
from common.errors import StoreCorruptError, StoreError
from common.inside import leads_outside
from common.safetensors_file import METADATA, Header, SafetensorsError, TensorSpec, read_header
from common.store_index import CONFIG_FILE, INDEX_FILE, FileEntry, Index, packed_specs
from common.strict_json import read_object


def read_checked(path: Path) -> tuple[Index, dict[str, Any]]:
    """The index and the config of the store in the directory `path`. Raises StoreError, in one line."""
    if not path.is_dir():
        raise StoreError(f"{path} is not a directory, expected a store")
    if not (path / INDEX_FILE).exists():
        raise StoreError(
            f"{path} has no {INDEX_FILE}, so it is not a store; make one with: "
            "python -m feeder.quantize MODEL_DIR STORE_DIR"
        )
    data = _read_json(path, INDEX_FILE)
    with _naming(path / INDEX_FILE):
        files = store_json.parse_files(data)
    for entry in files or ():
        _check_other(path, entry)
    config = _read_json(path, CONFIG_FILE)
    with _naming(path / INDEX_FILE):
        index = store_json.parse(data, config)
    _check_files(path, index)
    return index, config


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An error that does not yet say of which file it is."""
    try:
        yield
    except StoreError as error:
        raise type(error)(f"{path}: {error}") from error


def _read_json(path: Path, name: str) -> dict[str, Any]:
    _require_inside(path, name)
    try:
        return read_object(path / name)
    except ValueError as error:
        raise StoreError(f"{path / name}: {error}") from error


def _require_inside(path: Path, name: str) -> None:
    real = leads_outside(path, path / name)
    if real is not None:
        raise StoreError(
            f"{path / name} is a link to {real}, outside the store; "
            "put the file itself there, if it is meant"
        )


def _check_files(path: Path, index: Index) -> None:
    """Check that the files hold exactly the tensors that the index names."""
    expected: dict[str, list[TensorSpec]] = {}
    for weight in index.weights:
        expected.setdefault(weight.file, []).extend(packed_specs(weight.name, weight.shape))
    for kept in index.residents:
        spec = TensorSpec(kept.name, kept.dtype, kept.shape)
        expected.setdefault(kept.file, []).append(spec)
    for file, specs in expected.items():
        _require_inside(path, file)
        try:
            header = read_header(path / file)
        except SafetensorsError as error:
            raise StoreError(f"{error}; quantize the checkpoint again") from error
        _check_header(path / file, header, specs)


def _check_other(path: Path, entry: FileEntry) -> None:
    """Check a file without tensors, all of it: none of them is large."""
    file = path / entry.name
    _require_inside(path, entry.name)
    try:
        if not file.is_file():
            raise StoreError(f"{file} is missing, expected the file that {INDEX_FILE} names")
        size = file.stat().st_size
        found = checksum(file.read_bytes()) if size == entry.bytes else f"of {size} bytes"
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}") from error
    if found != entry.checksum:
        raise StoreCorruptError(
            f"{file}: the checksum is {found}, expected {entry.checksum} of {entry.bytes} bytes; "
            "the store is damaged, quantize the checkpoint again"
        )


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
    if header.metadata != METADATA:
        raise StoreError(
            f"{path}: __metadata__ is {header.metadata!r:.60}, expected {METADATA}; "
            "the store is damaged, quantize the checkpoint again"
        )
