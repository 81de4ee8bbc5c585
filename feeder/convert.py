"""Integers and scales of a ready-made checkpoint become codes and scales of the store.

Owns what of a block of 128 the store's format can hold, and the count of what it could not. Knows no kind of
checkpoint.

A block keeps its integers if all of it has one scale and they lie in -8...7, or in -7...8: then they are
stored negated, and so is the scale. Its scale is rounded to bf16, which is exact for a bf16 scale and moves
an fp16 one by 2**-8 of it at most. Any other block is dequantized and quantized again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common import int4
from common.blocks import BLOCK, MAX_CODE, MIN_CODE, scale_count
from feeder.checkpoints.source import Grouped

if TYPE_CHECKING:
    from common.int4 import Rule


@dataclass
class Tally:
    """Blocks by what became of them, and how far the weights have moved."""

    exact: int = 0
    rounded: int = 0  # the same integers, the scale rounded to bf16
    again: int = 0
    squared_error: float = 0.0
    squared: float = 0.0

    @property
    def blocks(self) -> int:
        return self.exact + self.rounded + self.again

    @property
    def error(self) -> float:
        """Root of the sum of squared differences over that of squared values."""
        return (self.squared_error / self.squared) ** 0.5 if self.squared else 0.0

    def keep(self, codes: torch.Tensor, source: torch.Tensor, stored: torch.Tensor) -> None:
        """Count blocks that keep their codes [G, 128], by their scales in the source and in the store [G]."""
        exact = int((stored.float() == source).sum())
        self.exact += exact
        self.rounded += len(codes) - exact
        squares = codes.float().square_().sum(dim=1).double()
        self.squared += float((squares * source.double().square()).sum())
        self.squared_error += float((squares * (stored.double() - source.double()).square()).sum())

    def requantize(self, values: torch.Tensor, packed: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Count the blocks of `values`, floats [n], of which codes and scales `packed` were made."""
        values = values.float()
        found = int4.dequantize(*packed, values.shape, torch.float32)
        self.again += scale_count(len(values))
        self.squared += float(values.square().sum(dtype=torch.float64))
        self.squared_error += float((found - values).square().sum(dtype=torch.float64))

    def said(self, kind: str, method: str) -> str:
        """One line for people."""
        count = max(1, self.blocks)
        line = f"converted from {kind}: {self.exact / count:.1%} of the blocks bit for bit"
        if self.rounded:
            line += (
                f", {self.rounded / count:.1%} with the same codes and the scale rounded to bf16"
            )
        if self.again:
            line += (
                f", {self.again / count:.1%} quantized again by {method}, since the store's format"
            )
            line += " cannot hold them"
        line += f"; relative error of these weights {self.error:.2g}"
        if self.again:
            line += (
                "; if that is too much, use the original checkpoint: docs/checkpoints.md says when"
            )
        return line


def pack(
    piece: torch.Tensor | Grouped, device: torch.device, rule: Rule, tally: Tally | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a piece of a weight, on `device`; counted in `tally` if there is one.

    Raises ValueError if a value is NaN or Inf.
    """
    if isinstance(piece, Grouped):
        return convert(piece, rule, tally or Tally())
    packed = int4.quantize(piece.to(device), rule)
    if tally is not None:
        tally.requantize(piece.to(device), packed)
    return packed


def convert(piece: Grouped, rule: Rule, tally: Tally) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [code_bytes(n)] and scales bf16 [scale_count(n)] of a piece, on its device.

    The last block may be short. Raises ValueError if a value is NaN or Inf.
    """
    integers, scales = _blocks(piece)
    lowest, highest = integers.amin(dim=1), integers.amax(dim=1)
    alike = (scales == scales[:, :1]).all(dim=1)
    straight = alike & (lowest >= MIN_CODE) & (highest <= MAX_CODE)
    negated = alike & ~straight & (lowest >= -MAX_CODE) & (highest <= -MIN_CODE)
    kept = straight | negated
    codes = torch.where(negated[:, None], -integers, integers)
    source = torch.where(negated, -scales[:, 0], scales[:, 0])
    stored = source.to(torch.bfloat16)
    if not bool(stored[kept].isfinite().all()):
        raise ValueError("found a scale that is NaN or Inf (as bfloat16), expected finite ones")
    tally.keep(codes[kept], source[kept], stored[kept])
    again = (~kept).nonzero().view(-1)
    if len(again):
        values = integers[again].view(len(again), scales.shape[1], -1) * scales[again, :, None]
        packed, stored[again] = int4.quantize(values.view(-1), rule)
        codes[again] = int4.unpack(packed, len(again) * BLOCK).view(-1, BLOCK)
        tally.requantize(values.view(-1), (packed, stored[again]))
    return int4.pack(codes.view(-1)[: piece.numel()]), stored


def _blocks(piece: Grouped) -> tuple[torch.Tensor, torch.Tensor]:
    """integers int8 [G, 128] and their scales fp32 [G, 128 / run]; the last block filled up with zeros,
    which count as of its last scale."""
    count = scale_count(piece.numel())
    integers, scales = piece.integers, piece.scales
    missing = count * BLOCK - piece.numel()
    if missing:
        integers = torch.nn.functional.pad(integers, (0, missing))
        scales = torch.cat([scales, scales[-1:].expand(missing // piece.run)])
    return integers.view(count, BLOCK), scales.view(count, -1)
