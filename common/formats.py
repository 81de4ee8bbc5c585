"""What may lie in a slot: the formats that feeder and engine agree on, and their sizes. No torch.

``dequantized``: the weight [N, K] in the model's dtype. ``packed``: its INT4 codes and, from
``scales_offset`` on, its bf16 scales, as docs/format.md has them.
"""

from __future__ import annotations

from common.blocks import packed_span

DEQUANTIZED = "dequantized"
PACKED = "packed"
FORMATS = (DEQUANTIZED, PACKED)

#: A run of so many elements of one row shares a scale if K is a multiple of it. What multiplies with
#: packed weights works in such runs, and so many rows at a time; other weights go dequantized. All
#: published models have multiples.
RUN, ROWS = 64, 16


def packable(shape: tuple[int, int]) -> bool:
    """Whether a weight of ``shape`` (N, K) can be multiplied with as it is packed."""
    return shape[0] % ROWS == 0 and shape[1] % RUN == 0


def slot_bytes(slot_format: str, elements: int, itemsize: int) -> int:
    """What a weight of ``elements`` values takes in a slot; ``itemsize``: of the model's dtype."""
    return packed_span(elements) if slot_format == PACKED else elements * itemsize
