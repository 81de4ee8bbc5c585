"""The fused products on the GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from engine.w4a16 import (
    OneTokenCut,
    Scratch,
    TokensCut,
    multiply,
    multiply_one,
    multiply_tokens,
    spread,
)
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
    scratch = Scratch(x.device)
    assert error_of(multiply(x, weights, bias, scratch), expected) < torch.finfo(dtype).eps
    planes = spread(x)
    one = [OneTokenCut(16, 4, 1, 4), OneTokenCut(16, 2, 3, 4), OneTokenCut(32, 2, 8, 4)]
    several = [
        TokensCut(32, 2, False, 2, 3),
        TokensCut(64, 2, True, 4, 4),
        TokensCut(64, 8, True, 4, 3),
    ]
    for cut in one if tokens == 1 else several:
        rows_of_program = 2 * cut.tile if isinstance(cut, OneTokenCut) else cut.rows
        if any(count % rows_of_program for count in rows):
            continue
        found = []
        for _ in range(4):
            y = torch.full((tokens, sum(rows)), torch.nan, dtype=torch.float32, device="cuda")
            if isinstance(cut, OneTokenCut):
                multiply_one(planes, weights, bias, y, scratch, cut=cut)
            else:
                multiply_tokens(planes, tokens, weights, bias, y, scratch, cut)
            found.append(y)
        assert error_of(found[0], expected) < 1e-5, cut  # accumulated in fp32
        # The parts are added in one order, and the counters are left at zero.
        assert all(torch.equal(found[0], again) for again in found[1:]), cut


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error, by the largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max())
