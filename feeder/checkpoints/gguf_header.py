"""Whether a GGUF file's header can be believed, before the gguf package reads it.

That package's reader takes lengths and counts from the file as they are: one damaged number makes it fill
the memory. So the header is walked once, and every number in it is held against the file's size and against
what models have. Keeps nothing of what it sees. The format is described in the ggml project's docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from common.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_ALIGNMENT_KEY, _ALIGNMENT = b"general.alignment", 32  # of where the tensors begin
_MOST_KEYS = 1 << 14
_MOST_TENSORS = 1 << 17
_MOST_ITEMS = 1 << 22  # of all arrays: a vocabulary of a million has a few arrays of that length
_MOST_TEXT_BYTES = 16 << 20
_MOST_DIMENSIONS = 4
_MOST_ELEMENTS = 1 << 40


def check_header(path: Path, sizes: Mapping[int, tuple[int, int]]) -> None:
    """Raises CheckpointError, in one line, unless the header of `path` is whole and of sane size, and the
    file long enough for the tensors in it.

    sizes: by the number of a type the elements and the bytes of one of its blocks.
    """
    try:
        with path.open("rb") as file:
            _Walk(file, sizes).header()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is no GGUF file that can be read: {error}; fetch it again"
        ) from error


class _Walk:
    """A walk through a header; ValueError says what is wrong, in one clause."""

    def __init__(self, file: BinaryIO, sizes: Mapping[int, tuple[int, int]]) -> None:
        self._file, self._sizes = file, sizes
        self._left = os.fstat(file.fileno()).st_size
        self._items = 0
        self._data = 0  # bytes behind the header, up to the end of the last tensor

    def header(self) -> None:
        magic = self._take(4)
        if magic != _MAGIC:
            raise ValueError(f"it begins with {magic!r}, expected {_MAGIC!r}")
        version = self._number("I")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}, expected 2 or 3, little endian")
        tensors = self._at_most(self._number("Q"), _MOST_TENSORS, "tensors")
        keys = self._at_most(self._number("Q"), _MOST_KEYS, "keys")
        alignment = _ALIGNMENT
        for _ in range(keys):
            key, kind = self._text(), self._number("I")
            if key == _ALIGNMENT_KEY and kind == _UINT32:
                alignment = max(1, self._number("I"))
            else:
                self._value(kind)
        for _ in range(tensors):
            self._tensor()
        there = self._left - -self._file.tell() % alignment
        if self._data > max(0, there):
            raise ValueError(
                f"it is truncated: its tensors take {self._data} bytes, {max(0, there)} are there"
            )

    def _value(self, kind: int, in_array: bool = False) -> None:
        if kind in _SCALAR_BYTES:
            self._skip(_SCALAR_BYTES[kind])
        elif kind == _STRING:
            self._text()
        elif kind == _ARRAY and not in_array:
            item, count = self._number("I"), self._number("Q")
            self._items += count
            self._at_most(self._items, _MOST_ITEMS, "items in arrays")
            if item in _SCALAR_BYTES:
                self._skip(count * _SCALAR_BYTES[item])
            else:
                for _ in range(count):
                    self._value(item, in_array=True)
        else:
            raise ValueError(f"a value has the type {kind}, which is not known here")

    def _tensor(self) -> None:
        self._text()
        dimensions = self._at_most(self._number("I"), _MOST_DIMENSIONS, "dimensions of a tensor")
        sizes = [self._number("Q") for _ in range(dimensions)]
        elements = self._at_most(math.prod(sizes), _MOST_ELEMENTS, "elements of a tensor")
        kind, offset = self._number("I"), self._number("Q")
        # One that is not known the reader refuses.
        block, block_bytes = self._sizes.get(kind, (1, 0))
        self._data = max(self._data, offset + elements // block * block_bytes)

    def _text(self) -> bytes:
        """As much of it as a key has that is wanted here."""
        count = self._at_most(self._number("Q"), _MOST_TEXT_BYTES, "bytes of a text")
        start = self._take(min(count, len(_ALIGNMENT_KEY) + 1))
        self._skip(count - len(start))
        return start

    def _at_most(self, found: int, most: int, what: str) -> int:
        if found > most:
            raise ValueError(f"it says {found} {what}, expected at most {most}")
        return found

    def _number(self, kind: str) -> int:
        return int(struct.unpack(f"<{kind}", self._take(struct.calcsize(f"<{kind}")))[0])

    def _take(self, count: int) -> bytes:
        self._use(count)
        return self._file.read(count)

    def _skip(self, count: int) -> None:
        self._use(count)
        self._file.seek(count, os.SEEK_CUR)

    def _use(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise ValueError("it ends within its header")
