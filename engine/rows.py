"""Which rows of a pass belong to which sequence, for arithmetic that is to know one sequence at a time.

On the CPU a product may round otherwise for other numbers of rows, and so may a function where its vectors
end. There every sequence's rows are computed by themselves, by the very calls that it would get alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Rows:
    """How [1, rows, …] is divided. Outside of `divided` it is one piece."""

    def __init__(self) -> None:
        self._lengths: tuple[int, ...] = ()

    @contextmanager
    def divided(self, lengths: Sequence[int]) -> Iterator[None]:
        """For the duration of a pass whose sequences have so many rows each."""
        self._lengths = tuple(lengths)
        try:
            yield
        finally:
            self._lengths = ()

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Each sequence's rows of x, at addresses as good as those of a tensor of its own."""
        count = len(self._lengths)
        if count < 2:
            return [x]
        # Of logits there is one row a sequence.
        lengths = self._lengths if x.shape[1] == sum(self._lengths) else (1,) * count
        return [piece.clone() for piece in x.split(lengths, dim=1)]


def divide(module: nn.Module, rows: Rows) -> None:
    """Have a module that knows no rows but its own be called for each sequence, with that one's rows of
    all tensors that it is given."""
    forward = module.forward

    def by_sequence(*values: Any, **named: Any) -> Any:
        given = [*values, *named.values()]
        pieces = [rows.split(value) for value in given if isinstance(value, torch.Tensor)]
        if not pieces or len(pieces[0]) == 1:
            return forward(*values, **named)
        found = []
        for one in zip(*pieces, strict=True):
            own = iter(one)
            mine = [next(own) if isinstance(value, torch.Tensor) else value for value in given]
            words = dict(zip(named, mine[len(values) :], strict=True))
            found.append(forward(*mine[: len(values)], **words))
        if isinstance(found[0], torch.Tensor):
            return torch.cat(found, dim=1)
        return tuple(torch.cat(part, dim=1) for part in zip(*found, strict=True))

    module.forward = by_sequence
