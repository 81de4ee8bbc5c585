"""The method "hqq": half-quadratic steps to scales that a few large errors hardly move.

After Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). They
give each block a zero-point and solve for it; this format has none, so the scale is solved for. The
loss is the sum of |error| ** 0.5. A step splits off what is likely an outlier of the error, by the
proximal operator of that loss, and fits the scale to the rest by least squares.
"""

from __future__ import annotations

import torch

from feeder.candidates import Candidates, in_parts, joined

_STEPS = 20
_BETA, _BETA_GROWTH = 10.0, 1.01  # the weight of the quadratic half, in units of the scale
_STARTS = (7.0, 8.0, -8.0)  # absmax over these: the reference rule, and the two that reach -8


def hqq(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A rule of `common.int4`."""
    return joined([_hqq(part) for part in in_parts(blocks)])


def _hqq(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = Candidates(blocks, lambda residuals: residuals.abs_().sqrt_())
    for start in _STARTS:
        scales = found.largest / torch.full_like(found.largest, start)
        beta = _BETA
        for _ in range(_STEPS):
            found.try_scales(scales)
            codes = found.codes(scales)
            errors = _outliers((found.values - codes * scales) / scales, beta) * scales
            fitted = found.best_for(codes, found.values - errors)
            scales = torch.where(fitted.isfinite() & (fitted != 0), fitted, scales)
            beta *= _BETA_GROWTH
        found.try_scales(scales)
    return found.result()


def _outliers(errors: torch.Tensor, beta: float) -> torch.Tensor:
    """The proximal operator: errors [G, 128], in units of the scale, shrunk by 1 / (beta sqrt|e|)."""
    size = errors.abs()
    # A NaN, from a scale of 0, is no outlier; an error of 0 shrinks by infinity.
    kept = (size - 1 / (size.sqrt() * beta)).clamp_(min=0).nan_to_num_(nan=0.0)
    return kept.copysign_(errors)
