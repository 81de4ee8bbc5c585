"""INT4 to the model's dtype on the GPU: the Triton kernel and its checking launcher.

Equals common.int4.dequantize bit for bit: code x scale in fp32, rounded once. On the CPU that
reference itself is used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from common import int4
from common.repeated import Repeated

BLOCKS_PER_PROGRAM = 64  # measured on an H100, see bench/; flat from 32 to 128
NUM_WARPS = 4

_launches: dict[tuple[torch.device, torch.dtype, int, bool], Repeated] = {}


@triton.jit  # which gives the parameters their types
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    codes, scales, out, elements, BLOCKS: tl.constexpr
):
    """One program dequantizes BLOCKS blocks of 128.

    operand  shape               dtype             layout
    codes    [ceil(n / 2)]       uint8 (2 nibbles)  contiguous, 16-byte aligned, first code high
    scales   [ceil(n / 128)]     bf16              contiguous
    out      [n]                 bf16, fp16, fp32  contiguous, 16-byte aligned
    """
    first = tl.program_id(0).to(tl.int64) * BLOCKS  # int32 would overflow beyond 2**31 elements
    block = first + tl.arange(0, BLOCKS)
    at = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    pair = tl.load(codes + at, mask=at * 2 < elements, other=0).to(tl.int32)
    scale = tl.load(scales + block, mask=block * 128 < elements, other=0.0).to(tl.float32)
    high = (pair << 24) >> 28  # arithmetic: the nibbles are two's complement
    low = (pair << 28) >> 28
    code = tl.reshape(tl.join(high, low), (BLOCKS, 128)).to(tl.float32)
    to = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    value = (code * scale[:, None]).to(out.dtype.element_ty)
    tl.store(out + to, value, mask=to < elements)


def dequantize_into(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Dequantize whole blocks into ``out``.

    codes: uint8 [ceil(n / 2)]; scales: bf16 [ceil(n / 128)]; out: bf16, fp16 or fp32, n elements.
    All contiguous and on one device; codes and out 16-byte aligned. ValueError otherwise. On CUDA
    the work is queued on the current stream.
    """
    elements = out.numel()
    _check("codes", codes, (torch.uint8,), int4.code_bytes(elements), out.device)
    _check("scales", scales, (torch.bfloat16,), int4.scale_count(elements), out.device)
    _check("out", out, (torch.bfloat16, torch.float16, torch.float32), elements, out.device)
    if out.device.type == "cpu" and not interpreted():
        out.view(-1).copy_(int4.dequantize(codes, scales, (elements,), out.dtype))
        return
    for name, tensor in (("codes", codes), ("out", out)):
        if tensor.data_ptr() % 16:
            raise ValueError(f"{name} lies at {tensor.data_ptr():#x}: expected 16-byte alignment")
    # All that the compiler distinguishes: codes and out are aligned, as was checked.
    kind = (out.device, out.dtype, elements, scales.data_ptr() % 16 == 0)
    launch = _launches.get(kind)
    if launch is None:
        grid = (triton.cdiv(int4.scale_count(elements), BLOCKS_PER_PROGRAM),)
        launch = Repeated(_dequantize_kernel, grid, BLOCKS=BLOCKS_PER_PROGRAM, num_warps=NUM_WARPS)
        _launches[kind] = launch
    launch(codes, scales, out, elements)


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1), as CI does."""
    return bool(triton.knobs.runtime.interpret)


def _check(
    name: str,
    tensor: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    elements: int,
    device: torch.device,
) -> None:
    if (
        tensor.dtype not in dtypes
        or tensor.numel() != elements
        or tensor.device != device
        or not tensor.is_contiguous()
    ):
        found = (tensor.dtype, tensor.numel(), tensor.device, tensor.is_contiguous())
        raise ValueError(
            f"{name} is {found}: expected {dtypes}, {elements} elements, {device}, contiguous"
        )
