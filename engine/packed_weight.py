"""A packed weight as the products take it: two views of a slot. Knows neither slots nor kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Packed:
    """A packed weight on the device. codes: uint8 [ceil(N K / 2)], scales: bf16 [ceil(N K / 128)],
    both contiguous, the codes 16-byte aligned; ``shape`` is (N, K), K a multiple of 64."""

    codes: torch.Tensor
    scales: torch.Tensor
    shape: tuple[int, int]
