"""The method "gptq": round a column, and let the columns to come make up for its error.

After Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022), in the form of Chee et al., "QuIP" (2023), which needs no inverse: what column j
aims at is its own value plus the errors of the columns before it, times row j of a unit triangular
factor of the Hessian. What is least then is the error of the product, |x Wᵀ - x Qᵀ|², over the inputs x
that the Hessian is made of.

Owns the arithmetic for one weight, in fp32. Knows nothing of models, layers or text. The order of the
columns is free, since scales are chosen before: it shows nowhere in the format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from common import int4
from common.blocks import BLOCK, MAX_CODE, MIN_CODE, code_bytes, scale_count
from common.shortages import shortages
from feeder.search import under_weights, weighted

_DAMPINGS = (0.01, 0.1, 1.0)  # times the mean of the diagonal; the next if one does not suffice
_AT_ONCE = 128  # columns between two products with all errors so far
# Elements of a weight worked on at once: on the CPU few enough for its caches.
_CPU_ELEMENTS = 1 << 21
_GPU_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Curvature:
    """What a Hessian [K, K] means for rounding: how errors of some columns bear on others.

    ``order``: the columns as they are rounded, int64 [K]; the other fields but ``importance`` are in
    that order. ``factor``: unit lower triangular, fp32 [K, K]. ``pivots``: fp32 [K]. ``importance``:
    how much the error of each column counts by itself, fp32 [K], 1 in the mean. With A the factor and
    D the pivots, the damped Hessian is Aᵀ D A.
    """

    order: torch.Tensor
    factor: torch.Tensor
    pivots: torch.Tensor
    importance: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor) -> Curvature | None:
        """Of the sum of x xᵀ over inputs x, fp32 [K, K], which is used up: the factor lies in its memory.

        None if it is nothing to go by: not finite, zero, or not positive definite however it is damped.
        Takes memory for one more of its size; for two in host memory if the device has none.
        """
        diagonal = hessian.diagonal().clone()
        mean = diagonal.mean()
        if not bool(mean.isfinite()) or mean <= 0:
            return None
        # Most important columns first: what they do wrong, all the others can mend.
        order = diagonal.argsort(descending=True, stable=True)
        _reorder(hessian, order.flip(0))
        found = _cholesky(hessian.div_(mean))
        if found is None:
            return None
        lower, damping = found
        # The Cholesky factor of the reversed matrix, reversed again, is the upper triangular one.
        for first in range(0, len(hessian), _AT_ONCE):
            rows = hessian[first : first + _AT_ONCE]
            last = len(hessian) - first
            rows.copy_(lower[:, last - len(rows) : last].flip(0, 1).T)
        pivots = hessian.diagonal().clone()
        hessian.div_(pivots[:, None])
        return cls(order, hessian, pivots.square_(), diagonal / mean + damping)


def _reorder(matrix: torch.Tensor, order: torch.Tensor) -> None:
    """Put rows and columns of a matrix [K, K] in another order, in place."""
    for columns in matrix.split(_AT_ONCE, dim=1):
        columns.copy_(columns[order])
    for rows in matrix.split(_AT_ONCE):
        rows.copy_(rows[:, order])


def _cholesky(matrix: torch.Tensor) -> tuple[torch.Tensor, float] | None:
    """The lower factor of a matrix [K, K] that is damped in place, and by how much; None if it has none.
    It is in host memory if the matrix's device has no room for it."""
    so_far = 0.0
    for damping in _DAMPINGS:
        matrix.diagonal().add_(damping - so_far)
        so_far = damping
        try:
            with shortages():  # the solver takes memory past torch's allocator
                lower, failed = torch.linalg.cholesky_ex(matrix)
        except torch.OutOfMemoryError:
            lower, failed = torch.linalg.cholesky_ex(matrix.cpu())
        if not failed and bool(lower.diagonal().isfinite().all()):
            return lower, damping
        del lower
    return None


def gptq(
    weight: torch.Tensor, curvature: Curvature, poll: Callable[[], None] = lambda: None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize ``weight`` [N, K], any floating dtype, any device; the work is done where the curvature is.

    Returns codes uint8 [code_bytes(N K)] and scales bf16 [scale_count(N K)], on the CPU. ``poll`` is
    called often. Rows are kept as the methods without data round them where that is better by the
    Hessian: so no row, with those that share a block with it, is worse than by them.
    Raises ValueError if a value is NaN or Inf as bf16.
    """
    codes = torch.empty(code_bytes(weight.numel()), dtype=torch.uint8)
    scales = torch.empty(scale_count(weight.numel()), dtype=torch.bfloat16)
    for first, rows in _whole_blocks(weight, curvature.factor.device):
        poll()
        values = rows.to(curvature.factor.device, torch.float32)
        part_codes, part_scales = _best(values, curvature, poll)
        packed = int4.pack(part_codes.view(-1)[: values.numel()]).cpu()
        codes[first // 2 :][: packed.numel()] = packed
        scales[first // BLOCK :][: part_scales.numel()] = part_scales.cpu()
    return codes, scales


def round_columns(
    weight: torch.Tensor, scales: torch.Tensor, curvature: Curvature, poll: Callable[[], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes for given scales, one an element: all fp32 [K, N], columns in the order of the curvature.

    Returns the codes, and by how much each row's product is wrong, squared, by the Hessian, [N].
    """
    errors, codes = torch.empty_like(weight), torch.empty_like(weight)
    losses = torch.zeros_like(weight[0])
    factor = curvature.factor
    for first in range(0, len(weight), _AT_ONCE):
        poll()
        columns = slice(first, min(first + _AT_ONCE, len(weight)))
        aims = weight[columns].addmm(factor[columns, :first], errors[:first])
        within = factor[columns, columns]
        divisors = torch.where(scales[columns] == 0, math.inf, scales[columns])
        for at, column in enumerate(range(first, columns.stop)):
            torch.div(aims[at], divisors[at], out=codes[column])
            codes[column].round_().clamp_(MIN_CODE, MAX_CODE)
            torch.addcmul(
                weight[column], codes[column], scales[column], value=-1, out=errors[column]
            )
            aims[at + 1 :].addr_(within[at + 1 :, at], errors[column])
        # A column's aim less what it became: its error and what it bears of the errors before.
        aims.addcmul_(codes[columns], scales[columns], value=-1)
        losses += (aims.square_() * curvature.pivots[columns, None]).sum(0)
    return codes, losses


def losses_of(errors: torch.Tensor, curvature: Curvature) -> torch.Tensor:
    """By how much each row's product is wrong, squared, by the Hessian: errors fp32 [K, N] to [N]."""
    return ((curvature.factor @ errors).square_() * curvature.pivots[:, None]).sum(0)


def _whole_blocks(weight: torch.Tensor, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """The rows in parts that begin where a block does, each with its first element's number."""
    width = weight.shape[1]
    unit = rows_of_a_unit(width)
    elements = _CPU_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS
    step = max(1, elements // (unit * width)) * unit
    for first in range(0, len(weight), step):
        yield first * width, weight[first : first + step]


def rows_of_a_unit(width: int) -> int:
    """The fewest rows of ``width`` elements that are whole blocks."""
    return BLOCK // math.gcd(width, BLOCK)


def _best(
    values: torch.Tensor, curvature: Curvature, poll: Callable[[], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [G, 128] and scales bf16 [G] of rows [N, K] that begin where a block does."""
    blocks = _in_blocks(values)
    _, scales = under_weights(blocks, _in_blocks(curvature.importance.expand_as(values)))
    aims = values.T[curvature.order].contiguous()
    spread = _by_element(scales, values.shape).T[curvature.order].contiguous()
    found, losses = round_columns(aims, spread, curvature, poll)
    codes = torch.empty_like(found)
    codes[curvature.order] = found
    best = _in_blocks(codes.T.contiguous()).to(torch.int8), scales
    del aims, spread, found, codes
    units = rows_of_a_unit(values.shape[1])
    for rule in (weighted, int4.absmax):
        other = rule(blocks)
        back = (other[0] * other[1].float()[:, None]).view(-1)[: values.numel()].view_as(values)
        other_losses = losses_of((values - back).T[curvature.order], curvature)
        better = _by_unit(other_losses, units) < _by_unit(losses, units)
        per_block = better.repeat_interleave(units * values.shape[1] // BLOCK)[: len(scales)]
        best = (
            torch.where(per_block[:, None], other[0], best[0]),
            torch.where(per_block, other[1], best[1]),
        )
        losses = torch.where(better.repeat_interleave(units)[: len(values)], other_losses, losses)
    return best


def _in_blocks(values: torch.Tensor) -> torch.Tensor:
    flat = values.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _by_element(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The scale of each element, fp32 of ``shape``."""
    return scales.float().repeat_interleave(BLOCK)[: shape.numel()].view(shape)


def _by_unit(losses: torch.Tensor, rows: int) -> torch.Tensor:
    """Sums over units of ``rows`` rows, the last of which may be short."""
    return torch.nn.functional.pad(losses, (0, -len(losses) % rows)).view(-1, rows).sum(1)
