"""The methods "search" and "weighted": for each block the sign and scale with the least squared error.

A scale of either sign uses all sixteen codes: -8 then stands for the largest value, whichever side
it lies on. In "weighted" the error of a value counts by its size as well: errors of large values are
not random but cut the values off, so they add up in a product where those of small ones cancel.
"""

from __future__ import annotations

from functools import partial

import torch

from common.blocks import BLOCK
from feeder.candidates import Candidates, Weighting, in_parts, joined, total

# absmax over these, for either sign. 8 gives the largest value the code -8; up to 9.5 it is cut
# off so that the others lie closer; below 7 the least squares are hardly ever found.
_DIVISORS = tuple(6.5 + 0.25 * step for step in range(13))
_REFINEMENTS = 2
_NEIGHBOUR = 1.5 * 2.0**-8  # from a number of bf16 to the next, whatever its mantissa


def search(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A rule of `common.int4`: the squared error of no block exceeds that of the reference rule."""
    return joined([_search(part, None) for part in in_parts(blocks)])


def weighted(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the squared error that is weighted by `size_weights`."""
    return joined([_search(part, size_weights) for part in in_parts(blocks)])


def under_weights(blocks: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the squared error that is weighted by ``weights``, fp32 [G, 128], none negative."""
    found = []
    for part, given in zip(in_parts(blocks), in_parts(weights), strict=True):
        found.append(_search(part, partial(_given, given)))
    return joined(found)


def _given(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return weights


def size_weights(values: torch.Tensor) -> torch.Tensor:
    """How much the squared error of each value counts: its magnitude, plus its block's root mean
    square. values fp32 [G, 128]; measured against other shares of the two in docs/quality.md."""
    mean = total(values * values) * (1 / BLOCK)  # a power of two: exact
    return values.abs().add_(mean.sqrt_())


def _search(blocks: torch.Tensor, weighting: Weighting | None) -> tuple[torch.Tensor, torch.Tensor]:
    found = Candidates(blocks, torch.Tensor.square_, weighting)
    for divisor in _DIVISORS:
        scales = found.largest / torch.full_like(found.largest, divisor)
        found.try_scales(scales)
        found.try_scales(-scales)
    for _ in range(_REFINEMENTS):
        found.try_scales(found.best_for(found.codes(found.scales), found.values))
    best = found.scales
    for factor in (1 + _NEIGHBOUR, 1 - _NEIGHBOUR):
        found.try_scales(best * factor)
    return found.result()
