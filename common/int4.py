"""The INT4 format and its slow, obvious reference.

Owns the arithmetic, bit for bit; docs/format.md states the same rule in words. Knows nothing
of files, slots or kernels: whatever is faster must equal this.

    values   bf16, flattened row-major, blocks of 128, the last block padded with zeros
    scale    bf16, one a block; by the reference rule absmax / 7, an absmax of 0 counting as 1
    code     -8...7; by the reference rule round-half-to-even(value / scale), the division in bf16
    packed   two codes a byte, the first in the high nibble, an odd tail padded with code 0
    back     code x scale in fp32, then rounded to the model's dtype

Another rule may choose other scales and codes (`feeder.methods`); the bytes mean the same.

Two corners of the reference rule. absmax / 7 underflows to 0 when absmax is one of the three
smallest positive bf16 numbers (up to 3 x 2**-133): the scale stored is then 0 and every code of that
block is 0, so it reads back as zeros, never as NaN. And a scale that was rounded up may carry the
largest values past the end of the model's dtype, to Inf: in bf16 only above 3.3e38, in fp16 only
where the checkpoint's own values are not fp16.
"""

import math
from collections.abc import Callable, Sequence

import torch

from common.blocks import BLOCK, MAX_CODE, MIN_CODE, code_bytes, packed_bytes, scale_count

__all__ = [
    "BLOCK",
    "Rule",
    "absmax",
    "code_bytes",
    "dequantize",
    "finite_absmax",
    "pack",
    "packed_bytes",
    "quantize",
    "scale_count",
    "unpack",
]

# Blocks quantized at once. On the CPU few enough to stay in its caches (1 Mi values, 2 MiB in
# bf16: measured fastest from 1/2 to 2 Mi), on a GPU enough to keep it busy.
_CPU_CHUNK_BLOCKS = 1 << 13
_GPU_CHUNK_BLOCKS = 1 << 17


# Values of any floating dtype [G, 128] to (codes int8 [G, 128], scales bf16 [G]) on the same device.
# ValueError if a value is NaN or Inf as bf16.
Rule = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def finite_absmax(blocks: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each block, bf16 [G]. ValueError if one is NaN or Inf as bf16."""
    absmax = blocks.to(torch.bfloat16).abs().amax(dim=1)  # NaN if any value of the block is
    if not bool(absmax.isfinite().all()):
        raise ValueError("found NaN or Inf (as bfloat16), expected finite values")
    return absmax


def absmax(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference rule."""
    blocks = blocks.to(torch.bfloat16)
    largest = finite_absmax(blocks)
    # A divisor on the device: torch multiplies by the reciprocal when it is a CPU scalar.
    seven = torch.full((1,), 7, dtype=torch.bfloat16, device=blocks.device)
    scales = torch.where(largest == 0, 1, largest) / seven
    # Dividing by infinity gives code 0, which is what a scale that underflowed to 0 asks for.
    divisors = torch.where(scales == 0, math.inf, scales)
    codes = (blocks / divisors[:, None]).round_().clamp_(MIN_CODE, MAX_CODE)
    return codes.to(torch.int8), scales


def quantize(tensor: torch.Tensor, rule: Rule = absmax) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a tensor by `rule`, the reference one if none is named, on the device it lies on.

    tensor: any shape, any floating dtype, CPU or CUDA; n elements. The rule gets blocks of it,
    the last one padded with zeros.
    Returns (codes uint8 [code_bytes(n)], scales bf16 [scale_count(n)]) on the same device.
    Takes less than 256 MiB beside its result, and a copy of `tensor` if it is not contiguous.
    Raises ValueError if a value is NaN or Inf, also if it only becomes Inf as bf16; TypeError
    if the dtype is not a floating one.
    """
    if not tensor.is_floating_point():
        raise TypeError(f"found a tensor of {tensor.dtype}, expected a floating dtype")
    flat = tensor.reshape(-1)
    elements = flat.numel()
    codes = torch.empty(code_bytes(elements), dtype=torch.uint8, device=tensor.device)
    scales = torch.empty(scale_count(elements), dtype=torch.bfloat16, device=tensor.device)
    chunk = _CPU_CHUNK_BLOCKS if tensor.device.type == "cpu" else _GPU_CHUNK_BLOCKS
    for first in range(0, scale_count(elements), chunk):
        values = flat[first * BLOCK : (first + chunk) * BLOCK]
        padding = -values.numel() % BLOCK
        if padding:
            values = torch.nn.functional.pad(values, (0, padding))
        block_codes, scales[first : first + chunk] = rule(values.view(-1, BLOCK))
        chunk_codes = pack(block_codes.view(-1))
        start = first * BLOCK // 2
        stop = min(start + chunk_codes.numel(), codes.numel())  # the padding is not stored
        codes[start:stop] = chunk_codes[: stop - start]
    return codes, scales


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes, int8 [n] in -8...7, into uint8 [code_bytes(n)], the first in the high nibble."""
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    pairs = codes.view(torch.uint8).view(-1, 2)
    return (pairs[:, 0] << 4) | (pairs[:, 1] & 0x0F)


def unpack(packed: torch.Tensor, elements: int) -> torch.Tensor:
    """Unpack uint8 [code_bytes(elements)] into codes, int8 [elements]; the inverse of `pack`.

    Raises ValueError if the length of `packed` is not that of `elements` codes.
    """
    if packed.numel() != code_bytes(elements):
        raise ValueError(
            f"found {packed.numel()} bytes of codes, expected {code_bytes(elements)} "
            f"for {elements} elements"
        )
    signed = packed.view(torch.int8)
    high = signed >> 4  # an arithmetic shift: it carries the sign down
    low = (signed << 4) >> 4
    return torch.stack((high, low), dim=1).view(-1)[:elements]


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Reference dequantizer: code x scale in fp32, rounded to `dtype`.

    codes uint8 [code_bytes(n)], scales bf16 [scale_count(n)], n the product of `shape`.
    Returns a tensor of `shape` and `dtype` on the device of `codes`.
    Raises ValueError if the lengths are not those of `shape`.
    """
    elements = math.prod(shape)
    if scales.numel() != scale_count(elements):
        raise ValueError(
            f"found {scales.numel()} scales, expected {scale_count(elements)} "
            f"for the shape {tuple(shape)}"
        )
    values = unpack(codes, elements).to(torch.float32)
    blocks = torch.nn.functional.pad(values, (0, -elements % BLOCK)).view(-1, BLOCK)
    blocks = blocks * scales.to(torch.float32)[:, None]
    return blocks.view(-1)[:elements].to(dtype).view(tuple(shape))
