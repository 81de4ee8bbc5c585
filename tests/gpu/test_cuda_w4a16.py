"""The fused products on the GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from engine.w4a16 import Config, Scratch, choose, multiply
from tests.packed import pack_side_by_side


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 7, 16])
@pytest.mark.parametrize(
    "rows, columns",
    [([5120, 1024, 1024], 5120), ([5120], 27648), ([192, 64, 64], 192), ([896], 4864)],
)
def test_products(rows: list[int], columns: int, tokens: int, dtype: torch.dtype) -> None:
    weights, dense = pack_side_by_side(rows, columns, "cuda", seed=len(rows) + columns)
    x = torch.randn(tokens, columns, device="cuda").to(dtype)
    bias = torch.randn(sum(rows), device="cuda").to(dtype)
    expected = x.double() @ dense.double().T + bias.double()
    chosen = choose(tokens, rows, columns, x.device)
    configs = [chosen, Config(32, 4, 1, 4), Config(32, 2, 3, 4), Config(64, 2, 8, 4, 3)]
    for config in configs:
        if any(count % config.rows for count in rows):
            continue
        scratch = Scratch(x.device)
        first = multiply(x, weights, bias, scratch, config)
        error = (first.double() - expected).abs().max() / expected.abs().max()
        assert error < torch.finfo(dtype).eps, (config, float(error))
        for _ in range(3):  # the parts are added in one order, and the counters are left at zero
            assert torch.equal(multiply(x, weights, bias, scratch, config), first)
