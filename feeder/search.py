"""The method "search": for each block the sign and the scale with the least squared error.

A scale of either sign uses all sixteen codes: -8 then stands for the largest value, whichever side
it lies on. Nothing but squared error counts; where values lie in the matrix means nothing.
"""

from __future__ import annotations

import torch

from feeder.candidates import Candidates, in_parts, joined

# absmax over these, for either sign. 8 gives the largest value the code -8; up to 9.5 it is cut
# off so that the others lie closer; below 7 the least squares are hardly ever found.
_DIVISORS = tuple(6.5 + 0.25 * step for step in range(13))
_REFINEMENTS = 2
_NEIGHBOUR = 1.5 * 2.0**-8  # from a number of bf16 to the next, whatever its mantissa


def search(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A rule of `common.int4`: the error of no block exceeds that of the reference rule."""
    return joined([_search(part) for part in in_parts(blocks)])


def _search(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = Candidates(blocks, torch.Tensor.square_)
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
