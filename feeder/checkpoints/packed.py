"""INT4 checkpoints in safetensors: a Linear's weight is a few tensors, NAME.qweight and the like.

Owns finding those tensors, checking them against the config, and reading a weight row by row. A `Layout`
knows what they are called and what their bits mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common import checkpoint as files
from common.blocks import BLOCK
from common.checkpoint import TensorPlace, companion_files
from common.errors import CheckpointError
from common.families import expected_tensors
from common.store_index import RESIDENT_DTYPES
from feeder.checkpoints.source import Grouped, Part

if TYPE_CHECKING:
    import torch

FLOATS = tuple(RESIDENT_DTYPES)


@dataclass(frozen=True)
class Expected:
    """One of the tensors that make up a weight."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    optional: bool = False


class Layout(Protocol):
    """How one kind of checkpoint stores a weight [N, K]."""

    kind: str
    note: str
    main: str  # the tensor that tells a quantized weight from another

    def expected(self, shape: tuple[int, int]) -> dict[str, Expected]:
        """The tensors of a weight of `shape`, by what follows the dot. Raises CheckpointError."""

    def prepare(self, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Any:
        """What `rows` needs to know of a whole weight. Raises CheckpointError."""

    def rows(self, prepared: Any, first: int, last: int) -> Grouped:
        """Rows `first` to `last`, both multiples of 8 or the end, in the order of K."""


@dataclass
class PackedCheckpoint:
    """A Source for one layout. Linears that are not packed come as values, as in an original."""

    path: Path
    config: dict[str, Any]
    layout: Layout
    _values: dict[str, TensorPlace] = field(default_factory=dict)
    _packed: dict[str, dict[str, TensorPlace]] = field(default_factory=dict)
    _shapes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Reads all headers. Raises CheckpointError."""
        places = files.read_places(self.path)
        self._shapes, residents = expected_tensors(self.config)
        for name, shape in self._shapes.items():
            if f"{name}.{self.layout.main}" in places:
                self._packed[name] = self._take(places, name, shape)
            bias = f"{name}.bias"
            if bias in places and bias not in residents:
                _require_zeros(bias, places.pop(bias))  # some quantizers give every Linear one
        self._values = files.expected_places(self.path, self.config, places, self._packed)

    @property
    def kind(self) -> str:
        return self.layout.kind

    @property
    def note(self) -> str:
        return self.layout.note

    def parts(self) -> list[Part]:
        found = [
            (p.file, p.offset, Part(p.spec.name, p.spec.shape, p.spec.dtype, p.spec.bytes))
            for p in self._values.values()
        ]
        for name, places in self._packed.items():
            main = places[self.layout.main]
            size = sum(place.spec.bytes for place in places.values())
            part = Part(f"{name}.weight", self._shapes[name], "BF16", size, ready=True)
            found.append((main.file, main.offset, part))
        return [part for _, _, part in sorted(found, key=lambda entry: entry[:2])]

    def pieces(self, name: str, device: torch.device) -> Iterator[torch.Tensor | Grouped]:
        linear = name.removesuffix(".weight")
        if linear not in self._packed:
            yield from files.read_pieces(self._values[name])
            return
        shape = self._shapes[linear]
        tensors = {what: _read(place, device) for what, place in self._packed[linear].items()}
        try:
            prepared = self.layout.prepare(tensors, shape)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {linear}: {error}") from error
        step = rows_at_once(shape[1])
        for first in range(0, shape[0], step):
            yield self.layout.rows(prepared, first, min(first + step, shape[0]))

    def companions(self, scratch: Path) -> Sequence[Path]:
        return companion_files(self.path)

    def _take(
        self, places: dict[str, TensorPlace], name: str, shape: tuple[int, int]
    ) -> dict[str, TensorPlace]:
        """Take the tensors of a packed weight out of `places`, each checked."""
        found = {}
        for what, expected in self.layout.expected(shape).items():
            place = places.pop(f"{name}.{what}", None)
            if place is None:
                if expected.optional:
                    continue
                raise CheckpointError(
                    f"{self.path} lacks {name}.{what}, which its {self.layout.main} calls for; "
                    "fetch the checkpoint again"
                )
            spec = place.spec
            if spec.shape != expected.shape or spec.dtype not in expected.dtypes:
                raise CheckpointError(
                    f"{place.file}: {spec.name} is {spec.dtype} {list(spec.shape)}, expected "
                    f"{' or '.join(expected.dtypes)} {list(expected.shape)} for a weight "
                    f"{list(shape)} of {self.layout.kind} with these settings"
                )
            found[what] = place
        return found


def rows_at_once(columns: int) -> int:
    """Rows of a piece: half of PIECE_ELEMENTS or so, whole blocks of 128, and a multiple of 8."""
    unit = math.lcm(BLOCK // math.gcd(BLOCK, columns), 8)
    return max(1, files.PIECE_ELEMENTS // 2 // (unit * columns)) * unit


def _read(place: TensorPlace, device: torch.device) -> torch.Tensor:
    """A whole tensor. Its size was checked against the config's and the file's."""
    import torch

    found = torch.empty(place.spec.bytes, dtype=torch.uint8)
    files.read_bytes(place.file, place.offset, found.numpy().data)
    dtype = getattr(torch, files.TORCH_DTYPES[place.spec.dtype])
    return found.view(dtype).view(place.spec.shape).to(device)


def _require_zeros(name: str, place: TensorPlace) -> None:
    if place.spec.dtype not in files.TORCH_DTYPES:
        raise CheckpointError(
            f"{place.file}: {name} is {place.spec.dtype}, expected one of "
            f"{', '.join(files.TORCH_DTYPES)}"
        )
    if any(bool(piece.count_nonzero()) for piece in files.read_pieces(place)):
        raise CheckpointError(
            f"{place.file}: {name} is not zero, and models of this kind have no such bias; "
            "is it a checkpoint of another kind?"
        )
