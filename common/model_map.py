"""The model as a map: a row for each kind of weight, a column for each layer, and what each cell's
state is called. For those who draw it. Knows no slots and no sockets.

A status says the states of all weights in one text, a character for a weight, in the store's order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

#: What each character of a status's ``weight_states`` means.
STATES = {
    "s": "resident",  # with the engine until it is asked back
    "u": "in use",  # lent for one use
    "r": "ready",
    "f": "filling",
    "v": "asked back",
    ".": "not in a slot",
    "!": "waited for",  # by an engine that is blocked
}
#: More weights than this have no map: the text is to fit a message many times over.
MOST = 1 << 16

_IN_LAYER = re.compile(r"(?:^|.*?\.)(\d+)\.(.+)")


@dataclass(frozen=True)
class Row:
    """``weights[column]``: the index of the layer's weight of this kind, None if it has none."""

    label: str
    weights: tuple[int | None, ...]


def rows(names: Sequence[str]) -> list[Row]:
    """The map of a model whose weights have these names: those in layers, then the others, one a row."""
    kinds: dict[str, dict[int, int]] = {}
    single: list[Row] = []
    for index, name in enumerate(names):
        found = _IN_LAYER.fullmatch(name)
        if found is None:
            single.append(Row(name.rpartition(".")[2], (index,)))
        else:
            kinds.setdefault(found[2], {})[int(found[1])] = index
    last = [kind.rpartition(".")[2] for kind in kinds]
    labels = [
        short if last.count(short) == 1 else kind for short, kind in zip(last, kinds, strict=True)
    ]
    layers = sorted({layer for kind in kinds.values() for layer in kind})
    return [
        *(
            Row(label, tuple(map(at.get, layers)))
            for label, at in zip(labels, kinds.values(), strict=True)
        ),
        *single,
    ]
