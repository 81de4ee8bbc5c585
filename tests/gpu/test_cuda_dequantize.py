"""The kernel on the GPU equals the reference on the CPU, bit for bit."""

from __future__ import annotations

import pytest
import torch

from common import int4
from common.dequantize import dequantize_into

POISON = 0xFF


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("elements", [1, 127, 128, 129, 8191, 8192, 1_000_003, 27648 * 5120])
def test_kernel_equals_reference(elements: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(elements)
    codes = torch.randint(256, (int4.code_bytes(elements),), dtype=torch.uint8, generator=generator)
    scales = torch.randn(int4.scale_count(elements), generator=generator).to(torch.bfloat16)
    # Room behind the end, to see that nothing is written there.
    size = elements * dtype.itemsize
    space = torch.full((size + 4096,), POISON, dtype=torch.uint8, device="cuda")
    out = space[:size].view(dtype)
    dequantize_into(codes.cuda(), scales.cuda(), out)
    expected = int4.dequantize(codes, scales, (elements,), dtype)
    # Compared as bytes, so that -0.0 differs from 0.0.
    assert torch.equal(out.cpu().view(torch.uint8), expected.view(torch.uint8))
    assert bool((space[size:] == POISON).all())


def test_a_kernel_that_is_found_again_takes_other_operands() -> None:
    """Of one size, from other places, on another stream, with scales that are aligned or not."""
    elements, blocks = 8192 + 128, 65
    memory = torch.zeros(blocks + 8, dtype=torch.bfloat16, device="cuda")
    for number in range(12):
        generator = torch.Generator().manual_seed(number)
        codes = torch.randint(256, (elements // 2,), dtype=torch.uint8, generator=generator)
        scales = torch.randn(blocks, generator=generator).to(torch.bfloat16)
        there = memory[number % 3 :][:blocks]
        there.copy_(scales)
        dtype = [torch.bfloat16, torch.float16][number // 6]
        out = torch.full((elements,), torch.nan, dtype=dtype, device="cuda")
        on_device = codes.cuda()
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            dequantize_into(on_device, there, out)
        torch.cuda.synchronize()
        expected = int4.dequantize(codes, scales, (elements,), dtype)
        assert torch.equal(out.cpu().view(torch.uint8), expected.view(torch.uint8))


def test_operands_are_checked() -> None:
    codes = torch.zeros(64, dtype=torch.uint8, device="cuda")
    scales = torch.ones(1, dtype=torch.bfloat16, device="cuda")
    out = torch.empty(128, dtype=torch.bfloat16, device="cuda")
    dequantize_into(codes, scales, out)
    wrong = [
        (codes[:-1], scales, out),
        (codes, scales.float(), out),
        (codes.cpu(), scales, out),
        (codes, scales, torch.empty(128, dtype=torch.float64, device="cuda")),
        (torch.zeros(65, dtype=torch.uint8, device="cuda")[1:], scales, out),
    ]
    for operands in wrong:
        with pytest.raises(ValueError):
            dequantize_into(*operands)
