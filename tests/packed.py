"""Packed weights in one piece of memory, as they lie in slots, and what they stand for."""

from __future__ import annotations

import torch

from common import int4
from common.blocks import packed_span, scales_offset
from engine.packed_weight import Packed


def pack_side_by_side(
    rows: list[int], columns: int, device: str, seed: int
) -> tuple[list[Packed], torch.Tensor]:
    """Random weights of ``rows`` rows each; and all of them, dequantized to fp32, below each other."""
    generator = torch.Generator().manual_seed(seed)
    spans = [-(-packed_span(count * columns) // 512) * 512 for count in rows]
    memory = torch.empty(sum(spans) + 512, dtype=torch.uint8, device=device)
    at = -memory.data_ptr() % 512
    weights, dense = [], []
    for count, span in zip(rows, spans, strict=True):
        elements = count * columns
        values = torch.randn(count, columns, generator=generator)
        codes, scales = int4.quantize(values)
        piece = memory[at:][: packed_span(elements)]
        packed = Packed(
            piece[: codes.numel()],
            piece[scales_offset(elements) :].view(torch.bfloat16),
            (count, columns),
        )
        packed.codes.copy_(codes)
        packed.scales.copy_(scales)
        weights.append(packed)
        dense.append(int4.dequantize(codes, scales, (count, columns), torch.float32))
        at += span
    return weights, torch.cat(dense).to(device)
