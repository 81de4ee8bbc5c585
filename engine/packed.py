"""Products with packed weights, by whatever is fastest for so many tokens. Knows no slots.

Up to 16 tokens the fused kernels read the weight as it is packed. More tokens are bound by arithmetic:
the weight is dequantized into scratch memory, once for all of them, and multiplied by cuBLAS, which is
also what happens on the CPU. There the result equals that of a dequantized slot to the last bit.
"""

from __future__ import annotations

import torch
from torch import nn

from common.blocks import BLOCK, code_bytes, scale_count
from common.dequantize import dequantize_into
from common.footprint import SCRATCH_ELEMENTS
from engine.packed_weight import Packed
from engine.rows import Rows

MAX_FUSED_TOKENS = 16


class Products:
    """All products of one engine: the kernels' scratch memory, and what is chosen when."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.rows = Rows()  # of a pass over several sequences
        self._dense = torch.empty(0, dtype=dtype, device=device)
        self.fused = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
        if self.fused:
            from engine.w4a16 import Scratch

            self._scratch = Scratch(device)

    def fits(self, x: torch.Tensor) -> bool:
        """Whether the fused kernels take x, [..., K]."""
        return self.fused and x.numel() <= MAX_FUSED_TOKENS * x.shape[-1]

    def linear(self, x: torch.Tensor, weight: Packed, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., K] times one weight, plus ``bias`` [N]: [..., N]."""
        if self.fits(x):
            return self.side_by_side(x, [weight], bias)
        rows, columns = weight.shape
        step = max(1, min(rows, SCRATCH_ELEMENTS // columns))
        while step < rows and step * columns % BLOCK:
            step -= 1  # parts begin at whole blocks
        if self._dense.numel() < step * columns:
            self._dense = torch.empty(step * columns, dtype=self._dtype, device=x.device)
        parts = []
        for first in range(0, rows, step):
            count = min(step, rows - first)
            dense = self._dense[: count * columns]
            codes = weight.codes[first * columns // 2 :][: code_bytes(dense.numel())]
            scales = weight.scales[first * columns // BLOCK :][: scale_count(dense.numel())]
            dequantize_into(codes, scales, dense)
            part_bias = None if bias is None else bias[first : first + count]
            parts.append(self.dense(x, dense.view(count, columns), part_bias))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def dense(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [..., K] times a dequantized weight [N, K], by the very call of nn.Linear."""
        pieces = self.rows.split(x)
        found = [nn.functional.linear(piece, weight, bias) for piece in pieces]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def side_by_side(
        self, x: torch.Tensor, weights: list[Packed], bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [..., K], of few tokens, times up to three weights in one launch: [..., N of all]."""
        from engine.w4a16 import multiply

        flat = x.reshape(-1, x.shape[-1])
        return multiply(flat, weights, bias, self._scratch).view(*x.shape[:-1], -1)
