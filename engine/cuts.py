"""How products are cut: what `python -m bench.kernels tune` found on an H100, as rules for all shapes.

A cut must fit the shape; otherwise it changes speed and, by the order of sums, the last bits.
"""

from __future__ import annotations

from functools import cache
from math import gcd

from engine.w4a16 import OneTokenCut, TokensCut

MANY = 4000  # programs: so many that larger ones pay
TURNS = 8  # of a program, at most, where there are few programs
FEW = 1200


@cache
def one_token_cut(rows: tuple[int, ...], columns: int) -> OneTokenCut:
    """For one token, weights of so many ``rows``, and ``columns``.

    Eight rows a tile and four runs a turn make a short program that reads 256 bytes of a row at once;
    long rows are split, so that no program takes many turns.
    """
    total, common = sum(rows), gcd(*rows)
    tile = 16 if total // 32 >= MANY and common % 32 == 0 else 8
    while tile > 1 and common % (2 * tile):
        tile //= 2
    runs = 2 if tile == 16 else 4
    turns = -(-columns // (2 * runs * 128))
    split = 1
    while total // (2 * tile) * split < FEW and turns > TURNS * split:
        split *= 2
    return OneTokenCut(tile, runs, split, 4)


@cache
def tokens_cut(rows: tuple[int, ...], columns: int) -> TokensCut:
    """For 2 to 16 tokens."""
    total, common = sum(rows), gcd(*rows)
    size = 64 if total * columns >= 1 << 27 else 32
    while size > 16 and common % size:
        size //= 2
    split, turns = 1, columns // 128
    while total // size * split < 640 and turns >= 16 * split:
        split *= 2
    return TokensCut(size, split, 4 if split > 1 and size == 64 else 2, 3 if size == 64 else 4)
