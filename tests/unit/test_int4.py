"""The INT4 format against oracles that share no code with it."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import int4

SMALLEST = Fraction(1, 1 << 133)  # the smallest positive bf16
LARGEST = Fraction(255 << 120)


def to_bf16(value: Fraction) -> Fraction:
    """Round to the nearest bf16, half to even, in exact arithmetic; the value must be in range."""
    if value == 0:
        return value
    exponent = abs(value).numerator.bit_length() - abs(value).denominator.bit_length()
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    quantum = max(Fraction(2) ** (exponent - 7), SMALLEST)
    rounded = round(value / quantum) * quantum  # round() of a Fraction is half to even
    assert abs(rounded) <= LARGEST
    return rounded


def oracle(values: list[Fraction]) -> tuple[list[int], list[Fraction]]:
    """The rule of the format, in exact arithmetic: a code a value, a scale a block."""
    codes, scales = [], []
    for first in range(0, len(values), 128):
        block = values[first : first + 128]
        absmax = max(abs(value) for value in block) or Fraction(1)
        scale = to_bf16(absmax / 7)
        scales.append(scale)
        for value in block:
            code = round(to_bf16(value / scale)) if scale else 0
            codes.append(max(-8, min(7, code)))
    return codes, scales


def exact(tensor: torch.Tensor) -> list[Fraction]:
    return [Fraction(value) for value in tensor.double().tolist()]


def from_bits(bits: list[int]) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def finite_bits() -> st.SearchStrategy[int]:
    """The 16 bits of any bf16 but NaN and Inf; the top exponents are for a test of their own."""
    return st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7FFF < 0x7F00)


def assert_equals_oracle(tensor: torch.Tensor) -> None:
    packed, scales = int4.quantize(tensor)
    codes, expected_scales = oracle(exact(tensor))
    assert int4.unpack(packed, len(codes)).tolist() == codes
    assert exact(scales) == expected_scales
    assert packed.numel() == int4.code_bytes(len(codes)) == math.ceil(len(codes) / 2)
    assert scales.numel() == int4.scale_count(len(codes)) == math.ceil(len(codes) / 128)


@given(st.lists(finite_bits(), min_size=1, max_size=300))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_bits_equal_the_exact_oracle(bits: list[int]) -> None:
    assert_equals_oracle(from_bits(bits))


@given(st.integers(0, 200), st.lists(st.integers(-255, 255), min_size=1, max_size=140))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_values_of_one_exponent_equal_the_exact_oracle(exponent: int, mantissas: list[int]) -> None:
    """Neighbouring magnitudes, where rounding decides, down to the subnormals."""
    values = torch.tensor(mantissas, dtype=torch.float64) * 2.0 ** (exponent - 133)
    assert_equals_oracle(values.to(torch.bfloat16))


@given(st.lists(finite_bits(), min_size=1, max_size=300))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_dequantize_is_code_times_scale_rounded_once(bits: list[int]) -> None:
    tensor = from_bits(bits)
    codes, scales = oracle(exact(tensor))
    products = [code * scales[index // 128] for index, code in enumerate(codes)]
    packed = int4.quantize(tensor)
    exactly = int4.dequantize(*packed, (len(bits),), torch.float32)
    assert exact(exactly) == products  # 3 bits times 8 bits: fp32 holds it
    rounded = int4.dequantize(*packed, (len(bits),), torch.bfloat16)
    assert exact(rounded) == [to_bf16(product) for product in products]


def test_scale_of_every_positive_bf16() -> None:
    values = from_bits(list(range(1, 0x7F80)))
    blocks = torch.zeros(values.numel(), 128, dtype=torch.bfloat16)
    blocks[:, 5] = values
    scales = int4.quantize(blocks)[1]
    assert exact(scales) == [to_bf16(value / 7) for value in exact(values)]


def test_ties_round_half_to_even() -> None:
    # absmax 7 makes the scale 1, so that a value is its own quotient.
    values = torch.tensor([7, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -3.5, 6.5, -6.5])
    packed, scales = int4.quantize(values)
    assert scales.tolist() == [1.0]
    expected = [7, 0, 2, 2, 4, 0, -2, -2, -4, 6, -6]
    assert int4.unpack(packed, len(expected)).tolist() == expected


def test_example_of_the_format_document() -> None:
    packed, scales = int4.quantize(torch.tensor([7, -3.5, 0.5, 1.5, -7]))
    assert packed.numpy().tobytes().hex(" ").upper() == "7C 02 90"
    assert scales.view(torch.uint8).numpy().tobytes().hex(" ").upper() == "80 3F"
    document = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    assert "NAME.codes    7C 02 90" in document
    assert "NAME.scales   80 3F" in document


def test_zero_block_has_the_scale_of_absmax_1() -> None:
    packed, scales = int4.quantize(torch.zeros(130))
    assert packed.tolist() == [0] * 65
    assert exact(scales) == [to_bf16(Fraction(1, 7))] * 2
    assert int4.dequantize(packed, scales, (130,), torch.float32).eq(0).all()


def test_scale_that_underflows_gives_zeros_never_nan() -> None:
    values = torch.tensor([1, -2, 3, 0, -3], dtype=torch.float64) * 2.0**-133
    packed, scales = int4.quantize(values.to(torch.bfloat16))
    assert (packed.tolist(), scales.tolist()) == ([0, 0, 0], [0.0])
    assert int4.dequantize(packed, scales, (5,), torch.bfloat16).tolist() == [0.0] * 5


def test_code_minus_8_is_reached_and_clamped() -> None:
    # A subnormal absmax of 10 quanta has a scale of 1 quantum: -10 is clamped to -8.
    values = torch.tensor([10, -10, -8, 4], dtype=torch.float64) * 2.0**-133
    packed, _ = int4.quantize(values.to(torch.bfloat16))
    assert int4.unpack(packed, 4).tolist() == [7, -8, -8, 4]


def test_first_code_is_in_the_high_nibble_and_the_tail_is_zero() -> None:
    packed = int4.pack(torch.tensor([1, -1, -8], dtype=torch.int8))
    assert packed.tolist() == [0x1F, 0x80]


def test_every_byte_unpacks_and_packs_to_itself() -> None:
    packed = torch.arange(256).to(torch.uint8)
    codes = int4.unpack(packed, 512)
    assert (codes.min(), codes.max()) == (-8, 7)
    assert int4.pack(codes).equal(packed)
    assert int4.unpack(packed, 511).equal(codes[:511])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_other_dtypes_are_rounded_to_bf16_first(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 77, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = int4.quantize(tensor.to(torch.bfloat16))
    assert all(a.equal(b) for a, b in zip(int4.quantize(tensor), expected, strict=True))


def test_shape_and_strides_do_not_matter_only_the_row_major_order() -> None:
    tensor = torch.randn(9, 50, dtype=torch.bfloat16)
    expected = int4.quantize(tensor.T.contiguous().view(-1))
    assert all(a.equal(b) for a, b in zip(int4.quantize(tensor.T), expected, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3.4e38])
@pytest.mark.parametrize("position", [0, 127, 128, 299])
def test_nan_and_inf_are_refused_also_if_made_by_rounding(bad: float, position: int) -> None:
    tensor = torch.ones(300)
    tensor[position] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        int4.quantize(tensor)


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="int8"):
        int4.quantize(torch.zeros(3, dtype=torch.int8))


def test_wrong_lengths_are_refused() -> None:
    packed, scales = int4.quantize(torch.ones(300))
    with pytest.raises(ValueError, match="150 bytes of codes, expected 151"):
        int4.dequantize(packed, scales, (301,), torch.float32)
    with pytest.raises(ValueError, match="3 scales, expected 4"):
        int4.dequantize(packed, scales, (400,), torch.float32)


def quantize_by_numpy(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp32 and integers only, for tensors too large for exact arithmetic; no subnormals."""

    def round_to_bf16(array: np.ndarray) -> np.ndarray:
        bits = array.astype(np.float32).view(np.uint32)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits & 0xFFFF0000).view(np.float32)

    flat = round_to_bf16(values)
    blocks = np.pad(flat, (0, -flat.size % 128)).reshape(-1, 128)
    scales = round_to_bf16(np.abs(blocks).max(axis=1) / np.float32(7))
    codes = np.rint(round_to_bf16(blocks / scales[:, None])).clip(-8, 7).astype(np.int8)
    pairs = codes.reshape(-1)[: flat.size + flat.size % 2].reshape(-1, 2).view(np.uint8)
    return (pairs[:, 0] << 4 | pairs[:, 1] & 15), scales


def large_tensor() -> torch.Tensor:
    """Several of the chunks that are quantized at once, and an odd tail."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn((9 << 20) + 77, generator=generator)


def test_large_tensor_equals_numpy() -> None:
    tensor = large_tensor()
    packed, scales = int4.quantize(tensor)
    expected_packed, expected_scales = quantize_by_numpy(tensor.numpy().copy())
    assert np.array_equal(packed.numpy(), expected_packed)
    assert np.array_equal(scales.float().numpy(), expected_scales)


@pytest.mark.gpu
def test_cuda_equals_cpu() -> None:
    every_value = from_bits([bits for bits in range(0x10000) if bits & 0x7FFF < 0x7F80])
    generator = torch.Generator().manual_seed(5)
    shuffled = every_value[torch.randperm(every_value.numel(), generator=generator)]
    for tensor in (large_tensor(), every_value, shuffled, every_value[:3]):
        on_cpu, on_cuda = int4.quantize(tensor), int4.quantize(tensor.cuda())
        for a, b in zip(on_cpu, on_cuda, strict=True):
            assert b.is_cuda
            assert a.view(torch.uint8).equal(b.cpu().view(torch.uint8))
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            back = int4.dequantize(*on_cpu, tensor.shape, dtype)
            assert int4.dequantize(*on_cuda, tensor.shape, dtype).cpu().equal(back)
