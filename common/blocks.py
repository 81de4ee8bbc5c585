"""Sizes of the INT4 format: how many bytes and scales a tensor takes.

Owns the three numbers that the format is made of. Knows nothing of tensors, and imports
nothing, so that a process without torch can reckon sizes; `common.int4` does the arithmetic.
"""

BLOCK = 128  # elements that share one scale
MIN_CODE, MAX_CODE = -8, 7  # a nibble in two's complement


def code_bytes(elements: int) -> int:
    """Bytes that the codes of `elements` values take: two codes a byte, an odd tail padded."""
    return (elements + 1) // 2


def scale_count(elements: int) -> int:
    """Scales (bfloat16, 2 bytes each) of `elements` values: one a block, the last one partial."""
    return (elements + BLOCK - 1) // BLOCK


def packed_bytes(elements: int) -> int:
    """Bytes that `elements` values take packed: codes and scales."""
    return code_bytes(elements) + 2 * scale_count(elements)
