"""Sizes of the INT4 format: how many bytes and scales a tensor takes.

Owns the three numbers that the format is made of. Knows nothing of tensors, and imports
nothing, so that a process without torch can reckon sizes; `common.int4` does the arithmetic.
"""

BLOCK = 128  # elements that share one scale
MIN_CODE, MAX_CODE = -8, 7  # a nibble in two's complement
PACKED_ALIGNMENT = (
    256  # where the scales begin behind the codes, in host memory and in packed slots
)


def code_bytes(elements: int) -> int:
    """Bytes that the codes of `elements` values take: two codes a byte, an odd tail padded."""
    return (elements + 1) // 2


def scale_count(elements: int) -> int:
    """Scales (bfloat16, 2 bytes each) of `elements` values: one a block, the last one partial."""
    return (elements + BLOCK - 1) // BLOCK


def packed_bytes(elements: int) -> int:
    """Bytes that `elements` values take packed: codes and scales."""
    return code_bytes(elements) + 2 * scale_count(elements)


def scales_offset(elements: int) -> int:
    """Where the scales begin in a packed weight that lies in one piece: codes first, then scales."""
    return -(-code_bytes(elements) // PACKED_ALIGNMENT) * PACKED_ALIGNMENT


def packed_span(elements: int) -> int:
    """Bytes from the first code to the last scale of a packed weight that lies in one piece."""
    return scales_offset(elements) + 2 * scale_count(elements)
