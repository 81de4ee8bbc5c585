"""A checkpoint in bf16, fp16 or fp32, as models are published: a Source around `common.checkpoint`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.checkpoint import Checkpoint, companion_files
from feeder.checkpoints.source import Grouped, Part

if TYPE_CHECKING:
    import torch


class Original:
    """A Source. Tensors come in the order of the files, each in the dtype it has there."""

    kind = "original"
    note = ""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError or CheckpointError."""
        self._checkpoint = Checkpoint.open(path)

    @property
    def config(self) -> dict[str, Any]:
        return self._checkpoint.config

    def parts(self) -> list[Part]:
        places = self._checkpoint.places.values()
        ordered = sorted(places, key=lambda place: (place.file, place.offset))
        return [Part(p.spec.name, p.spec.shape, p.spec.dtype, p.spec.bytes) for p in ordered]

    def pieces(self, name: str, device: torch.device) -> Iterator[torch.Tensor | Grouped]:
        return self._checkpoint.pieces(name)

    def companions(self, scratch: Path) -> list[Path]:
        return companion_files(self._checkpoint.path)
