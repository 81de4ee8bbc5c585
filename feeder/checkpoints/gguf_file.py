"""A GGUF file: its keys, its tensors, and their bytes as values or as integers and scales.

Owns reading, through the gguf package's reader for the header and its dequantizers for the types that have
no layout here. Knows nothing of models. Bytes are read, not mapped: a file that shrinks is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import CheckpointError
from feeder.checkpoints.gguf_header import check_header
from feeder.checkpoints.source import Grouped

if TYPE_CHECKING:
    import torch

_VALUES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_RUN = 32  # elements that share a scale in Q4_0 and Q8_0


@dataclass(frozen=True)
class GgufTensor:
    """A tensor. `type` is GGUF's name for how it is stored; `shape` is as torch has it."""

    name: str
    type: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    bytes: int

    @property
    def is_values(self) -> bool:
        """Whether it is stored as values, not quantized."""
        return self.type in _VALUES


class GgufFile:
    """An opened file, or all parts of one: `tensors` are all that their headers name."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """paths: the parts in order, or the one file. Raises CheckpointError, in one line."""
        self.path = paths[0]
        readers = [_reader(path) for path in paths]
        self._fields = readers[0].fields
        self.tensors: dict[str, GgufTensor] = {}
        for number, (path, reader) in enumerate(zip(paths, readers, strict=True)):
            _require_part(path, reader, number, len(paths))
            for found in reader.tensors:
                self._add(_tensor(path, found))

    def _add(self, tensor: GgufTensor) -> None:
        if tensor.name in self.tensors:
            raise CheckpointError(
                f"{tensor.file} has {tensor.name!r:.80}, which another part has too; "
                "are all parts of one model?"
            )
        _require_known(tensor)
        self.tensors[tensor.name] = tensor

    def key(self, name: str) -> Any:
        """The value of a key; None if there is none. Raises CheckpointError if it is damaged."""
        return _value(self.path, self._fields, name)


def decode(tensor: GgufTensor, raw: torch.Tensor, device: torch.device) -> torch.Tensor | Grouped:
    """What `raw`, uint8 on the CPU, some whole blocks of `tensor`, stands for: values there, or
    integers and scales on `device`."""
    import torch

    if tensor.is_values:
        return raw.view(getattr(torch, _VALUES[tensor.type]))
    if tensor.type == "Q4_0":  # a scale, then 16 bytes: 16 codes in the low halves, 16 in the high
        blocks = raw.view(-1, 2 + _RUN // 2).to(device)
        halves = blocks[:, 2:]
        integers = torch.cat((halves & 15, halves >> 4), dim=1).view(torch.int8) - 8
    elif tensor.type == "Q8_0":  # a scale, then 32 codes
        blocks = raw.view(-1, 2 + _RUN).to(device)
        integers = blocks[:, 2:].contiguous().view(torch.int8)
    else:
        return torch.from_numpy(_dequantized(raw.numpy(), tensor.type))
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    return Grouped(integers.reshape(-1), scales.view(-1), _RUN)


def one_line(error: BaseException) -> str:
    """What a library said of a file, which may quote the file: the beginning, on one line."""
    words = " ".join(str(error).split())
    return "".join(letter if letter.isprintable() else "?" for letter in words[:200])


def block_sizes(kind: str) -> tuple[int, int]:
    """Elements and bytes of a block of the type `kind`."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    elements, size_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return elements, size_bytes


def _dequantized(raw: Any, kind: str) -> Any:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    blocks = raw.reshape(-1, block_sizes(kind)[1])
    return dequantize(blocks, GGMLQuantizationType[kind]).reshape(-1)


def _reader(path: Path) -> Any:
    """The package's reader, having read the header. Raises CheckpointError."""
    try:
        import numpy
        from gguf import GGUFReader
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError:
        raise CheckpointError(
            f"{path} is a GGUF file, and the package gguf is not installed: "
            "run python -m pip install gguf"
        ) from None
    check_header(path, {kind.value: size for kind, size in GGML_QUANT_SIZES.items()})
    try:
        with numpy.errstate(over="raise"):
            return GGUFReader(path)
    except (LookupError, ValueError, TypeError, ArithmeticError, OSError) as error:
        raise CheckpointError(
            f"{path} is no GGUF file that can be read: {one_line(error)}; fetch it again"
        ) from error


def _value(path: Path, fields: Mapping[str, Any], name: str) -> Any:
    """The value of a key; None if there is none. Raises CheckpointError if it is damaged."""
    field = fields.get(name)
    try:
        return None if field is None else field.contents()
    except (IndexError, ValueError) as error:
        raise CheckpointError(f"{path}: {name}: {one_line(error)}") from error


def _tensor(path: Path, found: Any) -> GgufTensor:
    shape = tuple(int(size) for size in reversed(found.shape.tolist()))
    offset, size_bytes = int(found.data_offset), int(found.n_bytes)
    return GgufTensor(found.name, found.tensor_type.name, shape, path, offset, size_bytes)


def _require_part(path: Path, reader: Any, number: int, count: int) -> None:
    """Raises CheckpointError unless the file says that it is part `number`, from 0, of `count`."""
    part, parts = (_value(path, reader.fields, f"split.{name}") for name in ("no", "count"))
    if (part or 0, parts or 1) != (number, count):
        raise CheckpointError(
            f"{path} is part {part!r:.20} of {parts!r:.20} by its keys, counted from 0, expected "
            f"{number} of {count}; all parts have to be there, named as they were published"
        )


def _require_known(tensor: GgufTensor) -> None:
    """Raises CheckpointError for a type that nothing here can read."""
    if tensor.is_values or tensor.type in ("Q4_0", "Q8_0"):
        return
    import numpy

    try:
        _dequantized(numpy.zeros(block_sizes(tensor.type)[1], dtype=numpy.uint8), tensor.type)
    except NotImplementedError:
        raise CheckpointError(
            f"{tensor.file}: {tensor.name!r:.80} is stored as {tensor.type}, which the package gguf "
            "cannot dequantize; use a file of Q4_0, Q8_0 or a K-quant"
        ) from None
