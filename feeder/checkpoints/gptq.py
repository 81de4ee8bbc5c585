"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

qweight  int32 [K / 8, N]    word [i, n] has the numbers of columns 8 i to 8 i + 7, lowest bits first
qzeros   int32 [G, N / 8]    word [g, j] has the zero points of rows 8 j to 8 j + 7; "gptq" stores
                             them less one, modulo 16, and "gptq_v2" as they are
scales   float [G, N]
g_idx    int32 [K]           the group of each column; may be absent if they are in order

value[n, k] = (number[n, k] - zero[g, n]) * scale[g, n],  g = g_idx[k]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from feeder.checkpoints.groups import (
    Groups,
    described,
    flag,
    group_columns,
    group_index,
    group_size,
    require,
    require_whole_words,
)
from feeder.checkpoints.packed import FLOATS, Expected
from feeder.checkpoints.source import Grouped
from feeder.checkpoints.words import PER_WORD, nibbles

if TYPE_CHECKING:
    import torch

_V1, _V2 = "gptq", "gptq_v2"
_SYMMETRIC = 8  # the zero point of all weights that are


class Gptq:
    """A Layout, by the settings of quantization_config or quantize_config.json."""

    kind = "gptq"
    main = "qweight"

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        """Raises CheckpointError for settings that are not understood."""
        require(settings, where, "bits", 4, default=None)
        require(settings, where, "is_marlin_format", False, default=False)
        require(settings, where, "pack_dtype", "int32", default="int32")
        key = "checkpoint_format" if "checkpoint_format" in settings else "format"
        self._less_one = require(settings, where, key, _V1, _V2, default=_V1) == _V1
        self._size = group_size(settings, where)
        symmetric = flag(settings, where, "sym", True)
        self._says_symmetric = symmetric and "sym" in settings
        reordered = flag(settings, where, "desc_act", False)
        found = f"4 bits, {described(self._size)}"
        found += "" if symmetric else ", asymmetric"
        self.note = found + (", desc_act (groups out of order)" if reordered else "")

    def expected(self, shape: tuple[int, int]) -> dict[str, Expected]:
        require_whole_words(shape, self.kind)
        rows, columns = shape
        groups = -(-columns // group_columns(self._size, columns))
        return {
            "qweight": Expected((columns // PER_WORD, rows), ("I32",)),
            "qzeros": Expected((groups, rows // PER_WORD), ("I32",)),
            "scales": Expected((groups, rows), FLOATS),
            "g_idx": Expected((columns,), ("I32",), optional=True),
        }

    def prepare(
        self, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]
    ) -> tuple[torch.Tensor, Groups]:
        size = group_columns(self._size, shape[1])
        zeros = nibbles(tensors["qzeros"])
        if self._less_one:
            zeros = (zeros + 1) & 15
        if self._says_symmetric:
            _require_version(zeros, _V1 if self._less_one else _V2)
        index = group_index(tensors.get("g_idx"), size, shape[1])
        scales = tensors["scales"].T.float().contiguous()
        return tensors["qweight"], Groups(scales, zeros.T.char(), size, index)

    def rows(self, prepared: tuple[torch.Tensor, Groups], first: int, last: int) -> Grouped:
        words, groups = prepared
        return groups.rows(nibbles(words[:, first:last].T), first, last)


def _require_version(zeros: torch.Tensor, version: str) -> None:
    """ValueError if all zero points are one off what they are in symmetric weights: then it is of the other
    version, and every value would be wrong."""
    low, high = (int(extreme) for extreme in zeros.aminmax())
    if low == high and abs(low - _SYMMETRIC) == 1:
        other = _V2 if version == _V1 else _V1
        raise ValueError(
            f"all zero points are {low} if its checkpoint_format is {version!r}, expected {_SYMMETRIC} "
            f"of symmetric weights; set checkpoint_format to {other!r} in its settings"
        )
