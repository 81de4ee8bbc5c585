"""FedLinear: acquire, multiply, release; nothing else. And groups of them that share an input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from common.formats import PACKED
from engine.client import WeightClient
from engine.ledger import Lease
from engine.packed import Products


class FedLinear(nn.Module):
    """y = x @ W.T + b, where W [N, K] is in a slot for just as long as the product needs it.

    With a dequantized slot it computes what nn.Linear computes, by the same call, so that results are
    the same to the bit. With a packed one see `engine.packed`.
    """

    group: Group | None = None  # of those that are given the same x one after the other

    def __init__(
        self,
        client: WeightClient,
        weight: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: torch.Tensor | None,
        products: Products,
    ) -> None:
        """``weight``: its index in the store; ``bias``: [N] of ``dtype``, resident."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.weight_index = weight
        self._client, self._shape, self._dtype = client, shape, dtype
        self.products = products

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.group is not None and (ready := self.group.result(self, x)) is not None:
            return ready
        lease = self._client.acquire(self.weight_index)
        try:
            return self.multiply(x, lease)
        finally:
            self._client.release(lease)

    def multiply(self, x: torch.Tensor, lease: Lease) -> torch.Tensor:
        """The product with what ``lease`` holds."""
        if lease.grant.format == PACKED:
            return self.products.linear(x, lease.packed(self._shape), self.bias)
        return self.products.dense(x, lease.weight(self._dtype, self._shape), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, weight={self.weight_index}"


class Group:
    """FedLinears that a layer calls in turn with one x: q, k and v, or gate and up.

    When all their weights are granted, packed, and the tokens few, the first multiplies for all, in one
    launch, and the others find their results. Else each goes its own way.
    """

    def __init__(
        self, client: WeightClient, products: Products, members: Sequence[FedLinear]
    ) -> None:
        self._client, self._products = client, products
        self._first, self._members = members[0], list(members)
        self._weights = [member.weight_index for member in members]
        self._shapes = [(member.out_features, member.in_features) for member in members]
        self._x: torch.Tensor | None = None
        self._version = 0
        self._results: dict[int, torch.Tensor] = {}
        biases = [member.bias for member in members]
        self._bias = None
        if all(bias is not None for bias in biases):
            self._bias = torch.cat([bias.data for bias in biases if bias is not None])
        self._uniform = self._bias is not None or all(bias is None for bias in biases)
        for member in members:
            member.group = self

    def result(self, member: FedLinear, x: torch.Tensor) -> torch.Tensor | None:
        """The member's product with x, if it can be had together with the others'."""
        if member is self._first:
            self._multiply(x)
        elif x is not self._x or _version(x) != self._version:
            return None
        return self._results.pop(member.weight_index, None)

    def _multiply(self, x: torch.Tensor) -> None:
        self._results.clear()
        self._x = None
        if not self._uniform or not self._products.fits(x):
            return
        leases = self._client.try_acquire(self._weights)
        if leases is None:
            return
        try:
            if all(lease.grant.format == PACKED for lease in leases):
                packed = [
                    lease.packed(shape) for lease, shape in zip(leases, self._shapes, strict=True)
                ]
                together = self._products.side_by_side(x, packed, self._bias)
                products = together.split([rows for rows, _ in self._shapes], -1)
            else:
                products = tuple(
                    member.multiply(x, lease)
                    for member, lease in zip(self._members, leases, strict=True)
                )
        finally:
            for lease in leases:
                self._client.release(lease)
        self._results = dict(zip(self._weights, products, strict=True))
        self._x, self._version = x, _version(x)


def _version(x: torch.Tensor) -> int:
    """Changes when x is written to. Tensors of inference mode do not tell."""
    return 0 if x.is_inference() else x._version
