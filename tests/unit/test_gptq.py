"""GPTQ's arithmetic: against the paper's own steps in float64, and against the methods without data."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import int4
from feeder import methods
from feeder.gptq import Curvature, gptq, round_columns

Tensor = torch.Tensor


def inputs(count: int, width: int, seed: int = 0) -> Tensor:
    """Correlated, of uneven size, as what goes into a Linear is. Of one distribution for every seed."""
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99))
    mix *= torch.logspace(0, -1.5, width)[:, None]
    sizes = torch.rand(width, generator=torch.Generator().manual_seed(98)) + 0.1
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return (drawn @ mix) * sizes


def weights(rows: int, width: int, seed: int = 5) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def curvature_of(x: Tensor) -> Curvature:
    found = Curvature.of(x.T @ x)
    assert found is not None
    return found


def back(weight: Tensor, packed: tuple[Tensor, Tensor]) -> Tensor:
    return int4.dequantize(*packed, weight.shape, torch.float32)


def damped(hessian: Tensor) -> Tensor:
    """The metric: the Hessian over the mean of its diagonal, and 1 % of that mean on the diagonal."""
    scaled = hessian.double() / hessian.double().diagonal().mean()
    return scaled + 0.01 * torch.eye(len(hessian), dtype=torch.float64)


def row_losses(weight: Tensor, found: Tensor, metric: Tensor) -> Tensor:
    errors = (weight - found).double()
    return ((errors @ metric) * errors).sum(1)


def by_the_paper(weight: Tensor, scales: Tensor, hessian: Tensor) -> tuple[Tensor, list[int]]:
    """Codes, and the order of the columns: round the next, spread its error by the inverse Hessian of
    the columns that are left, take it out of the inverse. In float64, one column after the other."""
    left = weight.double().clone()
    inverse = damped(hessian).inverse()
    order = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    codes = torch.zeros_like(weight)
    for column in order:
        codes[:, column] = (left[:, column] / scales[:, column]).round().clamp(-8, 7)
        wrong = left[:, column] - codes[:, column] * scales[:, column].double()
        left -= torch.outer(wrong / inverse[column, column], inverse[column])
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0  # it is not looked at again; its row and column are zero
        inverse[column, :column], inverse[column, column + 1 :] = 0, 0
        inverse[:column, column], inverse[column + 1 :, column] = 0, 0
    return codes, order


@pytest.mark.parametrize("width", [40, 300])  # in one batch of columns, and in several
def test_codes_are_those_of_the_paper(width: int) -> None:
    weight, x = weights(20, width), inputs(400, width)
    scales = weight.abs().amax(1, keepdim=True).expand_as(weight) / 6
    expected, order = by_the_paper(weight, scales, x.T @ x)
    found = curvature_of(x)
    assert found.order.tolist() == order
    columns = weight.T[found.order], scales.T[found.order].contiguous()
    codes, losses = round_columns(*columns, found, lambda: None)
    # One code may fall the other way in fp32, and takes others of its row along.
    same = (codes == expected.T[found.order]).all(0)
    assert int(same.sum()) >= 19
    product = torch.zeros_like(weight)
    product[:, found.order] = (codes * columns[1]).T
    assert losses.double() == pytest.approx(row_losses(weight, product, damped(x.T @ x)), rel=1e-3)
    plain = (weight / scales).round().clamp(-8, 7)
    assert int((codes == plain.T[found.order]).all(0).sum()) == 0  # the feedback does something


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 200), st.floats(1e-20, 1e20), st.integers(0, 99))
def test_without_correlations_it_is_plain_rounding(
    rows: int, width: int, size: float, seed: int
) -> None:
    weight = weights(rows, width, seed)
    scales = (torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) + 0.1) / 3
    found = Curvature.of(torch.eye(width) * size)
    assert found is not None
    codes, _ = round_columns(weight.T[found.order], scales.T[found.order], found, lambda: None)
    plain = (weight / scales).round().clamp(-8, 7)
    assert codes.equal(plain.T[found.order])


# K of whole blocks; blocks that run across rows, of an odd number of elements too.
@pytest.mark.parametrize("shape", [(70, 256), (64, 128), (50, 200), (33, 97), (3, 24)])
def test_products_are_nearer_on_inputs_that_it_has_not_seen(shape: tuple[int, int]) -> None:
    weight, seen, unseen = weights(*shape), inputs(900, shape[1]), inputs(700, shape[1], seed=1)
    found = back(weight, gptq(weight, curvature_of(seen)))

    def error(quantized: Tensor) -> float:
        return float((unseen @ (weight - quantized).T).square().sum())

    others = [back(weight, int4.quantize(weight, methods.rule(m))) for m in methods.METHODS]
    assert error(found) < 0.6 * min(map(error, others))


@pytest.mark.parametrize("shape", [(70, 256), (50, 200), (33, 97)])
@pytest.mark.parametrize("count", [3, 2000])
def test_no_row_is_worse_by_the_hessian_than_without_data(
    shape: tuple[int, int], count: int
) -> None:
    x = inputs(count, shape[1])
    weight = weights(*shape)
    weight[::3] *= weights(1, shape[1], seed=6)[0].exp()  # outliers
    packed = gptq(weight, curvature_of(x))
    metric = damped(x.T @ x)
    unit = 128 // math.gcd(128, shape[1])  # rows that are whole blocks together
    found = row_losses(weight, back(weight, packed), metric).split(unit)
    for method in ("absmax", "weighted"):
        other = back(weight, int4.quantize(weight, methods.rule(method)))
        for mine, its in zip(found, row_losses(weight, other, metric).split(unit), strict=True):
            assert float(mine.sum()) <= float(its.sum()) * 1.001


def test_inputs_that_never_come_leave_their_columns_as_they_are_rounded() -> None:
    weight, x = weights(64, 256), inputs(500, 256)
    x[:, 17] = 0
    x[:, 200:] = 0
    codes, scales = gptq(weight, curvature_of(x))
    values = int4.unpack(codes, weight.numel()).view_as(weight)
    by_element = scales.float().repeat_interleave(128).view_as(weight)
    plain = (weight / by_element).round().clamp(-8, 7)
    assert values[:, 17].equal(plain[:, 17].to(torch.int8))
    assert values[:, 200:].equal(plain[:, 200:].to(torch.int8))
    assert not values.equal(plain.to(torch.int8))


def test_a_hessian_that_says_nothing_is_none() -> None:
    assert Curvature.of(torch.zeros(8, 8)) is None
    assert Curvature.of(torch.full((8, 8), math.nan)) is None
    assert Curvature.of(torch.eye(8) * math.inf) is None
    hopeless = torch.full((8, 8), -100.0)
    hopeless.diagonal().fill_(1.0)
    assert Curvature.of(hopeless) is None


def test_a_hessian_that_rounding_spoiled_is_damped_more() -> None:
    x = inputs(50, 64)
    hessian = x.T @ x
    least = torch.linalg.eigvalsh(damped(hessian))[0]
    mean = hessian.diagonal().mean()
    spoiled = hessian - torch.eye(64) * float(least + 0.02) * mean
    found = Curvature.of(spoiled)
    assert found is not None and bool(found.factor.isfinite().all())
    weight = weights(16, 64)
    assert bool(back(weight, gptq(weight, found)).isfinite().all())


def test_the_same_again_and_of_every_dtype() -> None:
    weight = weights(40, 256).bfloat16()
    found = curvature_of(inputs(300, 256))
    first = gptq(weight, found)
    for again in (weight, weight.float(), weight.double()):
        assert all(a.equal(b) for a, b in zip(first, gptq(again, found), strict=True))


def test_zeros_and_what_is_no_number() -> None:
    found = curvature_of(inputs(300, 128))
    codes, scales = gptq(torch.zeros(3, 128), found)
    assert not codes.any() and scales.unique().numel() == 1
    for bad in (math.nan, math.inf, 3.4e38):
        weight = weights(3, 128)
        weight[1, 77] = bad
        with pytest.raises(ValueError, match="NaN or Inf"):
            gptq(weight, found)
