"""Scales and zero points of the groups of a weight's rows, and the settings that INT4 checkpoints share.

A group is `size` columns of one row, or, where there is an index, the columns that it gives that number.
Knows nothing of how they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.blocks import BLOCK
from common.errors import CheckpointError
from feeder.checkpoints.source import Grouped

if TYPE_CHECKING:
    import torch


def group_columns(size: int, columns: int) -> int:
    """Columns of a group by the settings' `size`, where -1 means all of a row's `columns`."""
    return columns if size == -1 else min(size, columns)


@dataclass(frozen=True)
class Groups:
    """scales: fp32 [N, G]. zeros: int8 [N, G]. index: int64 [K], None if group g begins at g * size."""

    scales: torch.Tensor
    zeros: torch.Tensor
    size: int
    index: torch.Tensor | None

    def rows(self, codes: torch.Tensor, first: int, last: int) -> Grouped:
        """The rows `first` to `last`, of which `codes`, uint8 [last - first, K], are given."""
        import torch

        columns = codes.shape[1]
        scales, zeros = self.scales[first:last], self.zeros[first:last]
        if self.index is not None:
            run = 1
            scales, zeros = scales[:, self.index], zeros[:, self.index]
        else:
            run = math.gcd(BLOCK, self.size, columns)
            scales = scales.repeat_interleave(self.size // run, dim=1)[:, : columns // run]
            zeros = zeros.repeat_interleave(self.size, dim=1)[:, :columns]
        integers = codes.view(torch.int8) - zeros
        return Grouped(integers.reshape(-1), scales.reshape(-1), run)


def group_index(index: torch.Tensor | None, size: int, columns: int) -> torch.Tensor | None:
    """The index to keep, int64 [K]: none if it says what the size says. ValueError if it is damaged."""
    import torch

    if index is None:
        return None
    count = -(-columns // size)
    low, high = (int(extreme) for extreme in index.aminmax())
    if low < 0 or high >= count:
        raise ValueError(
            f"found groups {low} to {high} in its index of groups, expected 0 to {count - 1}; "
            "fetch the checkpoint again"
        )
    if index.equal(torch.arange(columns, device=index.device, dtype=index.dtype) // size):
        return None
    return index.long()


def require(settings: Mapping[str, Any], where: str, key: str, *allowed: Any, default: Any) -> Any:
    """A setting that has to be one of `allowed`. Raises CheckpointError."""
    found = settings.get(key, default)
    if not any(type(found) is type(one) and found == one for one in allowed):
        expected = " or ".join(repr(one) for one in allowed)
        raise CheckpointError(
            f"{where}: {key} is {found!r:.60}, expected {expected}; "
            "use another checkpoint of the model, or the original"
        )
    return found


def group_size(settings: Mapping[str, Any], where: str, key: str = "group_size") -> int:
    """The columns of a group; -1: all of them. Raises CheckpointError."""
    found = settings.get(key, 128)
    if type(found) is not int or not (found == -1 or 1 <= found <= 1 << 30):
        raise CheckpointError(
            f"{where}: {key} is {found!r:.60}, expected -1 or a number of columns, such as 128"
        )
    return found


def flag(settings: Mapping[str, Any], where: str, key: str, default: bool) -> bool:
    """A setting that is true or false. Raises CheckpointError."""
    return bool(require(settings, where, key, True, False, default=default))


def require_whole_words(shape: tuple[int, int], kind: str) -> None:
    """Raises CheckpointError for a weight [N, K] that does not fill words of eight either way."""
    if shape[0] % 8 or shape[1] % 8:
        raise CheckpointError(
            f"found a weight {list(shape)} in {kind}, expected multiples of 8; "
            "use the original checkpoint"
        )


def described(size: int) -> str:
    """Groups of `size`, in words."""
    return "one group a row" if size == -1 else f"groups of {size}"
