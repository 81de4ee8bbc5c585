"""How products are cut on which device: what `python -m bench.kernels tune` found, and a rule."""

from __future__ import annotations

from functools import cache
from math import gcd

import torch

from engine.w4a16 import OneTokenCut, TokensCut

PROGRAMS = 1200  # that keep a large GPU busy, at least


def one_token_cut(rows: list[int], columns: int, device: torch.device) -> OneTokenCut:
    """For one token, weights of so many ``rows``, and ``columns``."""
    return _one_token_rule(tuple(rows), columns)


def tokens_cut(rows: list[int], columns: int, device: torch.device) -> TokensCut:
    """For 2 to 16 tokens."""
    return _tokens_rule(tuple(rows), columns)


@cache
def _one_token_rule(rows: tuple[int, ...], columns: int) -> OneTokenCut:
    tile = 16
    while tile > 4 and gcd(*rows) % (2 * tile):
        tile //= 2
    split, turns = 1, columns // 256
    while sum(rows) // (2 * tile) * split < PROGRAMS and 2 * split <= turns // 2:
        split *= 2
    return OneTokenCut(tile, 2, split, 4)


@cache
def _tokens_rule(rows: tuple[int, ...], columns: int) -> TokensCut:
    size = 32
    while gcd(*rows) % size:
        size //= 2
    split, turns = 1, columns // 128
    while sum(rows) // size * split < PROGRAMS // 2 and 2 * split <= turns // 4:
        split *= 2
    return TokensCut(size, split, 2, 4)
