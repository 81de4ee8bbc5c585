"""The methods of quantizing, against exact arithmetic and against each other."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import int4
from common.errors import UsageError
from feeder import methods
from feeder.search import size_weights

BETTER = [name for name in methods.METHODS if name != "absmax"]
CASES = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
SMALLEST = 2.0**-133  # the smallest positive bf16


def from_bits(bits: list[int]) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def through(tensor: torch.Tensor, method: str) -> torch.Tensor:
    packed = int4.quantize(tensor, methods.rule(method))
    return int4.dequantize(*packed, tensor.shape, torch.float32)


def squared_errors(values: torch.Tensor, method: str) -> list[Fraction]:
    """Of each block, in exact arithmetic. values: any finite ones, [n]."""
    found = through(values, method).double().tolist()
    pairs = list(zip(found, values.double().tolist(), strict=True))
    return [
        sum(((Fraction(a) - Fraction(b)) ** 2 for a, b in pairs[first : first + 128]), Fraction(0))
        for first in range(0, len(pairs), 128)
    ]


def few_bits() -> st.SearchStrategy[int]:
    """bf16 of any sign and of any size whose codes cannot carry it past the end of fp32."""
    return st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7FFF < 0x7F00)


@given(st.lists(few_bits(), min_size=1, max_size=300))
@CASES
def test_search_is_never_worse_than_absmax_whatever_the_bits(bits: list[int]) -> None:
    values = from_bits(bits)
    both = zip(squared_errors(values, "search"), squared_errors(values, "absmax"), strict=True)
    # In fp32 a search may take two errors for equal that differ in the last bits.
    assert all(found <= reference * Fraction(1_000_001, 1_000_000) for found, reference in both)


@given(st.integers(0, 1 << 30), st.sampled_from([-130, -20, 0, 100]), st.integers(1, 700))
@CASES
def test_search_is_never_worse_than_absmax_on_bell_curves(
    seed: int, exponent: int, count: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator, dtype=torch.float64) * 2.0**exponent
    values = values.float()
    both = zip(squared_errors(values, "search"), squared_errors(values, "absmax"), strict=True)
    assert all(found <= reference * Fraction(1_000_001, 1_000_000) for found, reference in both)


def exhaustive(block: torch.Tensor, weights: torch.Tensor) -> float:
    """The least weighted squared error of any bf16 scale within two octaves, of either sign."""
    top = int(block.abs().max().bfloat16().view(torch.int16))
    bits = torch.arange(top - 5 * 128, top - 128 * 2 + 1, dtype=torch.int16)
    scales = torch.cat([bits.view(torch.bfloat16), -bits.view(torch.bfloat16)]).double()[:, None]
    codes = (block / scales).round().clamp(-8, 7)
    return float(((codes * scales - block).square() * weights).sum(1).min())


@pytest.mark.parametrize("method", ["search", "weighted"])
def test_searches_come_close_to_trying_every_scale(method: str) -> None:
    generator = torch.Generator().manual_seed(11)
    blocks = torch.randn(200, 128, generator=generator).exp()
    blocks *= torch.randn(200, 128, generator=generator)
    blocks[100:] = torch.randn(100, 128, generator=generator)
    weights = size_weights(blocks) if method == "weighted" else torch.ones_like(blocks)
    found = ((through(blocks, method) - blocks).double().square() * weights).sum(1)
    least = [exhaustive(b, w) for b, w in zip(blocks.double(), weights.double(), strict=True)]
    assert float(found.sum()) <= 1.01 * sum(least)
    reference = ((through(blocks, "absmax") - blocks).double().square() * weights).sum(1)
    assert bool((found <= reference * 1.000001).all())
    assert float((found / reference).mean()) < 0.8  # of the sum, a few blocks would decide


def test_hqq_lessens_the_roots_of_the_errors() -> None:
    with torch.random.fork_rng(devices=[]):  # a distribution takes no generator
        torch.manual_seed(12)
        blocks = torch.distributions.Laplace(0.0, 1.0).sample((300, 128)) * torch.rand(300, 1)
    roots = {m: (through(blocks, m) - blocks).abs().sqrt().sum(1) for m in ("hqq", "absmax")}
    assert bool((roots["hqq"] <= roots["absmax"] * 1.000001).all())
    assert float(roots["hqq"].sum()) < 0.97 * float(roots["absmax"].sum())


@pytest.mark.parametrize("method", BETTER)
@pytest.mark.parametrize("exponent", [-133, -127, -3, 0, 90])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_the_format_can_hold_comes_back_exactly(method: str, exponent: int, sign: int) -> None:
    generator = torch.Generator().manual_seed(13)
    codes = torch.randint(-8, 8, (40, 128), generator=generator)
    codes[:, 0] = -8  # all sixteen codes: only the right scale, with the right sign, has no error
    codes[:, 1] = 7
    mantissas = torch.randint(128, 256, (40, 1), generator=generator) if exponent > -127 else 1
    values = (codes.double() * mantissas * sign * 2.0**exponent).float()
    assert through(values, method).equal(values)


@pytest.mark.parametrize("method", methods.METHODS)
def test_zeros(method: str) -> None:
    packed, scales = int4.quantize(torch.zeros(130), methods.rule(method))
    assert packed.tolist() == [0] * 65
    assert scales.tolist() == [float(torch.tensor(1 / 7).bfloat16())] * 2


@pytest.mark.parametrize("method", BETTER)
@pytest.mark.parametrize("value", [0.7, -0.7, 1.0, -3e-39, 2.0**100])
def test_a_single_value_is_kept_as_well_as_its_scale_can_be(method: str, value: float) -> None:
    """The last block may have one value: a code times a bf16 is then within a bf16's rounding."""
    tensor = torch.tensor([0.0] * 128 + [value])
    found = through(tensor, method)
    assert found[:128].eq(0).all()
    assert abs(float(found[128]) - value) <= max(abs(value) * 2.0**-8, 4 * SMALLEST)


@pytest.mark.parametrize("method", BETTER)
def test_scales_of_the_smallest_numbers(method: str) -> None:
    """Here a scale has a few bits, or one: rounding it matters more than choosing it."""
    values = torch.tensor([10, -10, -8, 4, 0, 1], dtype=torch.float64) * SMALLEST
    assert 0 < float((through(values.bfloat16(), method) != 0).sum()) <= 5
    tiny = torch.tensor([1, -2, 3, 0, -3], dtype=torch.float64) * SMALLEST
    assert through(tiny.bfloat16(), method).tolist() == tiny.tolist()  # absmax makes zeros of them


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3.4e38])
@pytest.mark.parametrize("position", [0, 127, 299])
def test_nan_and_inf_are_refused(method: str, bad: float, position: int) -> None:
    tensor = torch.ones(300)
    tensor[position] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        int4.quantize(tensor, methods.rule(method))


@pytest.mark.parametrize("method", BETTER)
def test_blocks_do_not_know_each_other(method: str) -> None:
    """However a tensor is cut into pieces and parts, over several of those that a method takes."""
    values = torch.randn((1 << 18) * 2 + 77, generator=torch.Generator().manual_seed(14))
    whole = through(values, method)
    for first in (0, 128 * 2047, 128 * 4095):
        piece = values[first : first + 128 * 3]
        assert through(piece, method).equal(whole[first : first + 128 * 3])


@pytest.mark.parametrize("method", BETTER)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_count_by_their_values(method: str, dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 77, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = int4.quantize(tensor.float(), methods.rule(method))
    found = int4.quantize(tensor, methods.rule(method))
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(UsageError, match="method 'best' is not known: name one of weighted, "):
        methods.rule("best")
    assert methods.DEFAULT in methods.METHODS
    assert methods.rule("absmax") is int4.absmax
