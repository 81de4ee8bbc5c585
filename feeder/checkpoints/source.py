"""What the quantizer reads: tensors by name, as values, or as the integers and scales of a ready-made one.

Owns the interface that every kind of checkpoint has. Knows no kind, and not what becomes of the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Part:
    """A tensor of a source. `dtype` is what it is kept in if it stays a resident ("BF16", ...)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int  # to read
    ready: bool = False  # quantized in the source, though it may come as values


@dataclass(frozen=True)
class Grouped:
    """Some of a weight's elements, row-major, as integers times scales: so they are in the source.

    integers: int8 [n]. scales: fp32 [n / run], one for each `run` elements, a divisor of 128 and of n.
    """

    integers: torch.Tensor
    scales: torch.Tensor
    run: int

    def numel(self) -> int:
        return self.integers.numel()

    def values(self) -> torch.Tensor:
        """The product, fp32 [n]; exact, since the integers have 8 bits and the scales 16 or 24."""
        return (self.integers.view(-1, self.run) * self.scales[:, None]).view(-1)


class Source(Protocol):
    """An opened checkpoint. Opening has checked what headers can tell; all errors are one line."""

    @property
    def kind(self) -> str:
        """For the store's index: a word such as "gptq"; "original" for values as they were trained."""

    @property
    def note(self) -> str:
        """What was found, and what will become of it, for people; empty if there is nothing to say."""

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json, without what it says of quantizing."""

    def parts(self) -> Sequence[Part]:
        """All tensors, in the order in which they are best read."""

    def pieces(self, name: str, device: torch.device) -> Iterator[torch.Tensor | Grouped]:
        """The tensor `name` in row-major pieces of whole blocks of 128, the last one shorter.

        Values on the CPU in a dtype of safetensors, or integers and scales on `device`. A piece is good until
        the next one is asked for. Memory holds one piece, and one weight as it is in the source.
        """

    def companions(self, scratch: Path) -> Sequence[Path]:
        """Files that go along, such as the tokenizer's; those that must be made are made in `scratch`."""
