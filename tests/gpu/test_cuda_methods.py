"""Every method of quantizing gives the same bytes on the GPU as on the CPU."""

from __future__ import annotations

import pytest
import torch

from common import int4
from feeder import methods


@pytest.mark.parametrize("method", methods.METHODS)
def test_cuda_equals_cpu(method: str) -> None:
    generator = torch.Generator().manual_seed(21)
    curve = torch.randn((5 << 20) + 77, generator=generator)  # several parts, and an odd tail
    every_bits = torch.arange(0x10000).to(torch.uint16).view(torch.bfloat16)
    every = every_bits[every_bits.float().abs() < 3e38]
    shuffled = every[torch.randperm(every.numel(), generator=generator)]
    for tensor in (curve, curve.exp().to(torch.float16), every, shuffled, every[:3]):
        finite = tensor[tensor.isfinite()]
        on_cpu = int4.quantize(finite, methods.rule(method))
        on_cuda = int4.quantize(finite.cuda(), methods.rule(method))
        for a, b in zip(on_cpu, on_cuda, strict=True):
            assert b.is_cuda
            assert a.view(torch.uint8).equal(b.cpu().view(torch.uint8))


@pytest.mark.parametrize("method", methods.METHODS)
def test_memory_stays_within_its_bound(method: str) -> None:
    tensor = torch.randn(1 << 26, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packed = int4.quantize(tensor, methods.rule(method))
    results = sum(part.nbytes for part in packed)
    assert torch.cuda.max_memory_allocated() - before - results < 256 << 20
