"""FedLinear: acquire, multiply, release; nothing else."""

from __future__ import annotations

import torch
from torch import nn

from engine.client import WeightClient


class FedLinear(nn.Module):
    """y = x @ W.T + b, where W [N, K] is in a slot for just as long as the product needs it.

    Computes what nn.Linear computes, by the same call, so that results are the same to the bit.
    """

    def __init__(
        self,
        client: WeightClient,
        weight: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: torch.Tensor | None,
    ) -> None:
        """``weight``: its index in the store; ``bias``: [N] of ``dtype``, resident."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._client, self._weight, self._shape, self._dtype = client, weight, shape, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lease = self._client.acquire(self._weight)
        try:
            return nn.functional.linear(x, lease.weight(self._dtype, self._shape), self.bias)
        finally:
            self._client.release(lease)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, weight={self._weight}"
