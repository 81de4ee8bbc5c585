"""AWQ checkpoints of the layout "gemm", as AutoAWQ writes them.

qweight  int32 [K, N / 8]    word [k, j] has the numbers of rows 8 j to 8 j + 7, from the lowest bits
                             up in the order 0, 2, 4, 6, 1, 3, 5, 7
qzeros   int32 [G, N / 8]    the zero points, in the same order
scales   float [G, N]

value[n, k] = (number[n, k] - zero[g, n]) * scale[g, n],  g = k // group_size
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
    group_size,
    require,
    require_whole_words,
)
from feeder.checkpoints.packed import FLOATS, Expected
from feeder.checkpoints.source import Grouped
from feeder.checkpoints.words import PER_WORD, nibbles

if TYPE_CHECKING:
    import torch

# Where row 0, 1, ... of eight lies in its word: the inverse of the order above.
_PLACE_OF_ROW = (0, 4, 1, 5, 2, 6, 3, 7)


class Awq:
    """A Layout, by the settings of quantization_config or quant_config.json."""

    kind = "awq"
    main = "qweight"

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        """Raises CheckpointError for settings that are not understood."""
        require(settings, where, "w_bit" if "w_bit" in settings else "bits", 4, default=None)
        version = settings.get("version", settings.get("format", "gemm"))
        require(settings, where, "backend", "autoawq", "auto", None, default=None)
        if not isinstance(version, str) or version.lower() != "gemm":
            raise CheckpointError(
                f"{where}: version is {version!r:.60}, expected 'gemm'; "
                "use a checkpoint of that layout, or the original"
            )
        key = "group_size" if "group_size" in settings else "q_group_size"
        self._size = group_size(settings, where, key)
        asymmetric = flag(settings, where, "zero_point", True)
        self.note = f"4 bits, {described(self._size)}" + (", asymmetric" if asymmetric else "")

    def expected(self, shape: tuple[int, int]) -> dict[str, Expected]:
        require_whole_words(shape, self.kind)
        rows, columns = shape
        groups = -(-columns // group_columns(self._size, columns))
        return {
            "qweight": Expected((columns, rows // PER_WORD), ("I32",)),
            "qzeros": Expected((groups, rows // PER_WORD), ("I32",)),
            "scales": Expected((groups, rows), FLOATS),
        }

    def prepare(
        self, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]
    ) -> tuple[torch.Tensor, Groups]:
        zeros = _rows(tensors["qzeros"]).char()
        scales = tensors["scales"].T.float().contiguous()
        return tensors["qweight"], Groups(scales, zeros, group_columns(self._size, shape[1]), None)

    def rows(self, prepared: tuple[torch.Tensor, Groups], first: int, last: int) -> Grouped:
        words, groups = prepared
        return groups.rows(_rows(words[:, first // PER_WORD : last // PER_WORD]), first, last)


def _rows(words: torch.Tensor) -> torch.Tensor:
    """int32 [K, N / 8] to uint8 [N, K], in the order of rows."""
    numbers = nibbles(words).view(*words.shape, PER_WORD)[..., list(_PLACE_OF_ROW)]
    return numbers.flatten(1).T.contiguous()
