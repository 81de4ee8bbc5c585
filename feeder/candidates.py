"""Trying scales on blocks of values and keeping the best, for the methods that search.

Owns what makes such a search safe and the same on every device: blocks are brought to the same
magnitude by powers of two, which is exact; a scale is tried as the bf16 number that will be stored;
sums are added up pairwise in a fixed order, since a device's own order differs, and with it which of
two nearly equal scales wins. Knows nothing of which scales are worth trying.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from common.blocks import BLOCK, MAX_CODE, MIN_CODE
from common.int4 import absmax, finite_absmax

# Blocks worked on at once: what a search reads again and again should stay in a cache.
_CPU_BLOCKS = 1 << 11
_GPU_BLOCKS = 1 << 15
_SMALLEST = 2.0**-133  # of the positive numbers of bf16
_LEAST_POWER = 2.0**-126  # the smallest normal number, and so that its reciprocal is finite

# Residuals [G, 128] to the terms whose weighted sum is to be least; it may work in place.
Loss = Callable[[torch.Tensor], torch.Tensor]
# Values [G, 128] to how much the error of each counts, [G, 128].
Weighting = Callable[[torch.Tensor], torch.Tensor]


class Candidates:
    """Blocks [G, 128], the best scales found for them so far, and how bad those are.

    ``values``: fp32, each block times a power of two. ``scales``: fp32 [G, 1], times the same.
    Without a weighting all values count the same.
    It begins with the scales of the reference rule, so what is found is never worse.
    """

    def __init__(
        self, blocks: torch.Tensor, loss: Loss, weighting: Weighting | None = None
    ) -> None:
        largest = finite_absmax(blocks)
        bits = largest.view(torch.int16) & 0x7F80  # the exponent alone: a power of two, or 0
        power = bits.view(torch.bfloat16).to(torch.float32)[:, None]
        self._power = power.clamp(_LEAST_POWER, 1 / _LEAST_POWER)
        self._inverse = 1 / self._power
        self._loss = loss
        self.values = blocks.to(torch.float32) * self._inverse
        self._weights = None if weighting is None else weighting(self.values)
        self.largest = largest.to(torch.float32)[:, None] * self._inverse
        _, reference = absmax(blocks)
        self.scales = reference.to(torch.float32)[:, None] * self._inverse
        self.losses = self._loss_of(self.scales)
        # What is worth trying for a block of the smallest numbers may round to 0, as the reference
        # does; the smallest scale then holds them.
        self.try_scales(torch.full_like(self.scales, _SMALLEST) * self._inverse)

    def codes(self, scales: torch.Tensor) -> torch.Tensor:
        """The nearest codes under ``scales`` [G, 1], as fp32 [G, 128]; 0 where a scale is 0."""
        divisors = torch.where(scales == 0, math.inf, scales)
        return (self.values / divisors).round_().clamp_(MIN_CODE, MAX_CODE)

    def stored(self, scales: torch.Tensor) -> torch.Tensor:
        """``scales`` as they come back from bf16, where the smallest have few bits, or none."""
        return self._as_bf16(scales).to(torch.float32) * self._inverse

    def try_scales(self, scales: torch.Tensor) -> None:
        """Keep each of ``scales`` [G, 1] that is finite and better, once it is rounded."""
        rounded = self.stored(scales)
        losses = self._loss_of(rounded)
        better = losses < self.losses  # false for NaN
        self.losses = torch.where(better, losses, self.losses)
        self.scales = torch.where(better, rounded, self.scales)

    def best_for(self, codes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The scales [G, 1] with the least squares for given codes [G, 128]; NaN if all are 0."""
        weighted = codes if self._weights is None else codes * self._weights
        return total(values * weighted) / total(codes * weighted)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes int8 [G, 128] and scales bf16 [G]."""
        return self.codes(self.scales).to(torch.int8), self._as_bf16(self.scales).view(-1)

    def _as_bf16(self, scales: torch.Tensor) -> torch.Tensor:
        return (scales * self._power).to(torch.bfloat16)

    def _loss_of(self, scales: torch.Tensor) -> torch.Tensor:
        residuals = self.codes(scales).mul_(scales).sub_(self.values)
        terms = self._loss(residuals)
        return total(terms if self._weights is None else terms.mul_(self._weights))


def total(terms: torch.Tensor) -> torch.Tensor:
    """The sums [G, 1] of terms [G, 128], added up in the same order on every device."""
    width = terms.shape[1]
    while width > 1:
        width //= 2
        terms = terms[:, :width] + terms[:, width:]
    return terms


def in_parts(blocks: torch.Tensor) -> Iterator[torch.Tensor]:
    """The same blocks, as many at once as a cache holds."""
    yield from blocks.split(_CPU_BLOCKS if blocks.device.type == "cpu" else _GPU_BLOCKS)


def joined(
    results: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and scales of several parts, in their order."""
    codes, scales = zip(*results, strict=True)
    return torch.cat(codes).view(-1, BLOCK), torch.cat(scales)
