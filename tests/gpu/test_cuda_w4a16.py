"""The fused products on the GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from engine.w4a16 import (
    Epilogue,
    RingCut,
    Scratch,
    TokensCut,
    dependent_launch,
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
    one = [
        RingCut(3, 12, 128, 1),
        RingCut(4, 3, 128, 1),
        RingCut(2, 100, 128, 1),
        RingCut(),
        RingCut(4, 1, 64, 4),
    ]
    several = [
        TokensCut(32, 2, False, 2, 3),
        TokensCut(64, 2, True, 4, 4),
        TokensCut(64, 8, True, 4, 3),
    ]
    for cut in one if tokens == 1 else several:
        if isinstance(cut, TokensCut) and any(count % cut.rows for count in rows):
            continue
        found = []
        for _ in range(4):
            y = torch.full((tokens, sum(rows)), torch.nan, dtype=torch.float32, device="cuda")
            if isinstance(cut, TokensCut):
                multiply_tokens(planes, tokens, weights, bias, y, scratch, cut)
            else:
                multiply_one(planes, weights, bias, y, scratch, cut=cut)
            found.append(y)
        assert error_of(found[0], expected) < 1e-5, cut  # accumulated in fp32
        # The parts are added in one order, and the counters are left at zero.
        assert all(torch.equal(found[0], again) for again in found[1:]), cut


@pytest.mark.parametrize("rows, columns", [([5120, 1024, 1024], 5120), ([192, 64, 64], 192)])
def test_what_is_granted_together_does_not_show(rows: list[int], columns: int) -> None:
    """Weights that share x give the same bits together and one by one, whatever the number of programs,
    also while a kernel begins before the one before it has ended."""
    weights, _ = pack_side_by_side(rows, columns, "cuda", seed=columns)
    x = torch.randn(1, columns, device="cuda").bfloat16()
    scratch, pdl = Scratch(x.device), Epilogue(pdl=dependent_launch(x.device))
    planes = spread(x)
    y = torch.empty(sum(rows), device="cuda")
    multiply_one(planes, weights, None, y, scratch, pdl, RingCut(early=False))
    for programs in (12, 4, 1, 100):
        again, alone = torch.full_like(y, torch.nan), torch.full_like(y, torch.nan)
        cut = RingCut(per_processor=programs, early=programs != 4)
        multiply_one(planes, weights, None, again, scratch, pdl, cut)
        for weight, part in zip(weights, alone.split(rows), strict=True):
            multiply_one(planes, [weight], None, part, scratch, pdl, cut)
        assert torch.equal(again, y) and torch.equal(alone, y), programs
    assert not scratch.counters.any()


@pytest.mark.parametrize(
    "rows, columns",
    [
        ([5120, 1024, 1024], 5120), ([27648, 27648], 5120), ([12288, 12288], 5120),
        ([18944, 18944], 3584), ([208, 48], 640),
    ],
)  # fmt: skip
def test_what_is_granted_together_does_not_show_to_several_tokens(
    rows: list[int], columns: int
) -> None:
    """However the products are cut, which depends on how many rows there are."""
    weights, _ = pack_side_by_side(rows, columns, "cuda", seed=columns)
    scratch = Scratch(torch.device("cuda"))
    for tokens in (2, 5, 16):
        x = torch.randn(tokens, columns, device="cuda").bfloat16()
        together = multiply(x, weights, None, scratch)
        alone = [multiply(x, [weight], None, scratch) for weight in weights]
        assert torch.equal(torch.cat(alone, 1), together), tokens


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error, by the largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max())
