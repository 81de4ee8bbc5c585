"""Checkpoints of compressed-tensors in the format "pack-quantized", weights of 4 bits: w4a16.

    weight_packed      int32 [N, K / 8]   word [n, i] has the numbers of columns 8 i to 8 i + 7, lowest
                                          bits first, each plus 8
    weight_scale       float [N, G]
    weight_zero_point  int32 [N / 8, G]   if asymmetric: of rows 8 j to 8 j + 7, each plus 8
    weight_shape       int [2]            N, K
    weight_g_idx       int32 [K]          the group of each column, if they are out of order

    value[n, k] = (number[n, k] - zero[n, g]) * scale[n, g]

Both being plus 8, the difference needs no correction; a zero point that is not stored is 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from common.errors import CheckpointError
from feeder.checkpoints.groups import (
    Groups,
    described,
    flag,
    group_columns,
    group_index,
    group_size,
    require,
)
from feeder.checkpoints.packed import FLOATS, Expected
from feeder.checkpoints.source import Grouped
from feeder.checkpoints.words import PER_WORD, nibbles

if TYPE_CHECKING:
    import torch

_FORMAT = "pack-quantized"


class Compressed:
    """A Layout, by the settings of quantization_config."""

    kind = "compressed-tensors"
    main = "weight_packed"

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        """Raises CheckpointError for settings that are not understood."""
        require(settings, where, "format", _FORMAT, default=None)
        for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
            found = settings.get(key)
            if found and not (isinstance(found, dict) and found.get("format") == "dense"):
                raise CheckpointError(
                    f"{where}: found a {key}, expected none; use a checkpoint that only has its "
                    "weights quantized (w4a16), or the original"
                )
        weights = _one_scheme(settings, where)
        where = f"{where}, weights"
        require(weights, where, "num_bits", 4, default=None)
        require(weights, where, "type", "int", default="int")
        require(weights, where, "dynamic", False, default=False)
        strategy = require(weights, where, "strategy", "group", "channel", default="group")
        self._size = group_size(weights, where) if strategy == "group" else -1
        self._symmetric = flag(weights, where, "symmetric", True)
        self.note = f"4 bits, {described(self._size)}"
        self.note += "" if self._symmetric else ", asymmetric"
        if weights.get("actorder") == "group":
            self.note += ", actorder group (groups out of order)"

    def expected(self, shape: tuple[int, int]) -> dict[str, Expected]:
        rows, columns = shape
        groups = -(-columns // group_columns(self._size, columns))
        found = {
            "weight_packed": Expected((rows, -(-columns // PER_WORD)), ("I32",)),
            "weight_scale": Expected((rows, groups), FLOATS),
            "weight_shape": Expected((2,), ("I32", "I64")),
            "weight_g_idx": Expected((columns,), ("I32",), optional=True),
        }
        if not self._symmetric:
            zeros = Expected((-(-rows // PER_WORD), groups), ("I32",))
            found["weight_zero_point"] = zeros
        return found

    def prepare(
        self, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]
    ) -> tuple[torch.Tensor, int, Groups]:
        import torch

        rows, columns = shape
        if tuple(tensors["weight_shape"].tolist()) != shape:
            raise ValueError(
                f"weight_shape is {tensors['weight_shape'].tolist()}, expected {list(shape)}"
            )
        scales = tensors["weight_scale"].float()
        if self._symmetric:
            zeros = torch.full_like(scales, 8, dtype=torch.int8)
        else:
            zeros = nibbles(tensors["weight_zero_point"].T)[:, :rows].T.char()
        index = tensors.get("weight_g_idx")
        if index is not None and bool(
            (index == -1).all()
        ):  # how an index that is not used is saved
            index = None
        size = group_columns(self._size, columns)
        groups = Groups(scales, zeros, size, group_index(index, size, columns))
        return tensors["weight_packed"], columns, groups

    def rows(self, prepared: tuple[torch.Tensor, int, Groups], first: int, last: int) -> Grouped:
        words, columns, groups = prepared
        return groups.rows(nibbles(words[first:last])[:, :columns].contiguous(), first, last)


def _one_scheme(settings: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """How all weights are quantized. Raises CheckpointError if not all alike, or not only they."""
    schemes = settings.get("config_groups")
    if not isinstance(schemes, dict) or len(schemes) != 1:
        count = len(schemes) if isinstance(schemes, dict) else 0
        raise CheckpointError(
            f"{where}: found {count} config_groups, expected one; use a checkpoint whose weights "
            "are all quantized alike, or the original"
        )
    (scheme,) = schemes.values()
    weights = scheme.get("weights") if isinstance(scheme, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(f"{where}: its config_group has no weights, expected their settings")
    require(scheme, where, "format", None, _FORMAT, default=None)
    for key in ("input_activations", "output_activations"):
        require(scheme, where, key, None, default=None)
    return weights
