"""How products of several tokens are cut: what `python -m bench.kernels tune` found on an H100, as rules.

The order in which a row's products are summed depends on K alone. Weights that share an input are
multiplied together if all are granted, and one by one if not: that must not show in the result. So the
instruction that multiplies must not depend on how many rows there are, either.
"""

from __future__ import annotations

from functools import cache
from math import gcd

from engine.w4a16 import TokensCut

FEW = 640  # programs: so few that K is split
FEWER = 512  # programs of a split product: so few that each gets more warps
PART_BLOCKS = 5  # of K in a part, at least
#: Columns from which on programs of 64 rows have four warps, which take another instruction (wgmma) on an
#: H100. No weights that share an input have so many: down_proj does.
LONG = 1 << 14


@cache
def tokens_cut(rows: tuple[int, ...], columns: int) -> TokensCut:
    """For 2 to 16 tokens."""
    total, common = sum(rows), gcd(*rows)
    size = 64 if total * columns >= 1 << 27 else 32
    while common % size:
        size //= 2
    parts = min(8, _power_of_two(columns / 128 / PART_BLOCKS))
    split = total // size < FEW
    many = columns >= LONG if size == 64 else split and total // size * parts < FEWER
    return TokensCut(size, parts, split, 4 if many else 2, 3 if size == 64 else 4)


def _power_of_two(number: float) -> int:
    """The largest that is not above ``number``, at least 1."""
    power = 1
    while 2 * power <= number:
        power *= 2
    return power
