"""Products with packed weights where no fused kernel runs: those of the dequantized weights."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

import engine.packed
from engine.packed import Products
from tests.packed import pack_side_by_side

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [64, 192, 320])
def test_on_the_cpu_they_are_equal_to_the_bit(columns: int, dtype: torch.dtype) -> None:
    products = Products(CPU, dtype)
    generator = torch.Generator().manual_seed(columns)
    for rows, tokens, biased in ((48, 1, True), (17, 5, False), (200, 30, True), (3, 2, False)):
        (weight,), dense = pack_side_by_side([rows], columns, "cpu", seed=rows)
        x = torch.randn(1, tokens, columns, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator).to(dtype) if biased else None
        assert not products.fits(x)
        found = products.linear(x, weight, bias)
        assert found.dtype == dtype and found.shape == (1, tokens, rows)
        assert torch.equal(found, linear(x, dense.to(dtype), bias))


@pytest.mark.parametrize("columns", [64, 192, 320])
def test_a_weight_that_is_larger_than_the_scratch_memory(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is multiplied in parts, which begin at whole blocks of 128; the last one is smaller."""
    rows = 37
    (weight,), dense = pack_side_by_side([rows], columns, "cpu", seed=1)
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(2))
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(3))
    expected = linear(x.double(), dense.double(), bias.double())
    for elements in (2 * columns, 5 * columns + 1, 36 * columns, 37 * columns):
        monkeypatch.setattr(engine.packed, "SCRATCH_ELEMENTS", elements)
        found = Products(CPU, torch.float32).linear(x, weight, bias)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
