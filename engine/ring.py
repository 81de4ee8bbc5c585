"""The products of one token with packed weights, by programs that stay: what is lost between programs is not.

As many programs as fit at once share a product equally. A unit is two tiles of rows by RUNS runs of K;
each program takes units that follow one another, through K first, then through the tiles. The codes of
the next units are on their way to shared memory (STAGES of them) while one is multiplied, also across the
border of tiles, and also before the kernel before has ended. So there is one start and one end a launch.

A tile that several programs have part in is put together by the last of them (stream-K, Osama et al.,
2023). The sum of each unit is taken by itself, and the sums are added in the order of K, by whomever: so
the result depends on K and RUNS alone, not on how many programs there were. What is multiplied by what,
and what follows a product, is as in `engine.one_token`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.one_token import GLU, _eight, _end, factor_of, place

UNIT = 1024  # elements of K: 16 bytes of codes for each thread of a warp


@triton.jit
def _say(instruction: tl.constexpr):  # type: ignore[no-untyped-def]
    """An instruction by name, and 0: Triton's own word for it would keep the loop from having a ring."""
    return tl.inline_asm_elementwise(
        instruction + " mov.b32 $0, 0;", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _x(planes, first, stride, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x of some words, [1, SIZE] of each plane, in the layout in which codes come; 0 beyond the row. The
    mask is also there where all are within: the compiler then loads all of x first, and each row's codes
    when they are wanted, and needs 128 registers instead of 200."""
    column = first + tl.arange(0, SIZE)[None, :]
    at, mask = planes + column, column < stride
    return (
        tl.load(at, mask=mask, other=0.0),
        tl.load(at + stride, mask=mask, other=0.0),
        tl.load(at + 2 * stride, mask=mask, other=0.0),
        tl.load(at + 3 * stride, mask=mask, other=0.0),
        tl.load(at + 4 * stride, mask=mask, other=0.0),
        tl.load(at + 5 * stride, mask=mask, other=0.0),
        tl.load(at + 6 * stride, mask=mask, other=0.0),
        tl.load(at + 7 * stride, mask=mask, other=0.0),
        tl.load(at + 8 * stride, mask=mask, other=0.0),
    )


@triton.jit
def _rows(product, factor, TILE: tl.constexpr, RUNS: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sums of rows, [TILE], from products with words [TILE, RUNS WORDS] and the scales of runs."""
    by_run = tl.sum(tl.reshape(product, (TILE, RUNS, WORDS)), 2)
    return tl.sum(tl.fma(by_run, factor.to(tl.float32), tl.zeros_like(by_run)), 1)


@triton.jit
def _unit(  # type: ignore[no-untyped-def]
    a, b, factor_a, factor_b, planes, first, stride,
    TILE: tl.constexpr, RUNS: tl.constexpr, WORDS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """The sums of one unit, two times [TILE]."""
    x0, x1, x2, x3, x4, x5, x6, x7, x8 = _x(planes, first, stride, RUNS * WORDS)
    a = _eight(a, x0, x1, x2, x3, x4, x5, x6, x7, x8, ASM)
    b = _eight(b, x0, x1, x2, x3, x4, x5, x6, x7, x8, ASM)
    return _rows(a, factor_a, TILE, RUNS, WORDS), _rows(b, factor_b, TILE, RUNS, WORDS)


@triton.jit
def _all_units(parts, slots, UNITS: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sums of a tile's units, from ``parts`` [TILE] on, added in their order: which one `tl.sum`
    takes is not said, and may be another in each mode."""
    AT_ONCE: tl.constexpr = min(UNITS, 32)
    total = tl.zeros((TILE,), tl.float32)
    for first in range(0, UNITS, AT_ONCE):
        for unit in tl.static_range(AT_ONCE):
            at = parts + (first + unit) * slots
            total += tl.load(at, mask=first + unit < UNITS, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _where(  # type: ignore[no-untyped-def]
    unit, code0, code1, code2, scale0, scale1, scale2, rows0, rows1, total,
    TILE: tl.constexpr, UNITS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Of a unit: its tile, its part of K, its first row, and of both tiles the first row in its weight,
    and where the weight's codes and scales are, and the second tile's first row among the sums."""
    tile, part = unit // UNITS, unit % UNITS
    if MODE == GLU:
        row = tile * TILE
        local = row.to(tl.int64)
        return tile, part, row, local, local, code0, code1, scale0, scale1, total + row
    row, local, code, scale = place(
        tile, rows0, rows1, code0, code1, code2, scale0, scale1, scale2, 2 * TILE
    )
    return tile, part, row, local, local + TILE, code, code, scale, scale, row + TILE


@triton.jit
def ring_kernel(  # type: ignore[no-untyped-def]
    planes, words, scales, bias, y, parts, counters,
    code0, code1, code2, scale0, scale1, scale2, rows0, rows1, total, K, tiles,
    sums, sum_count, eps, hidden, norm, next_planes, next_sums,
    TILE: tl.constexpr, RUNS: tl.constexpr, UNITS: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr, RUN: tl.constexpr, MODE: tl.constexpr, NORM: tl.constexpr,
    SUMS: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One of any number of programs. Operands are those of `one_token.product_kernel`, but for these.

    operand      shape            dtype        layout
    parts        [UNITS, rows]    fp32         scratch; rows: of all weights; UNITS: of RUNS runs in a row
    counters     [tiles]          int32        zeros, and left as zeros
    next_sums    [tiles]          fp32         RESIDUAL: parts of the sum of hidden's squares
    """
    WORDS: tl.constexpr = RUN // 8
    runs = K // RUN
    stride = tl.multiple_of(K // 8, 8)  # words of a row
    slots = 2 * total if MODE == GLU else total
    units = tiles * UNITS
    first = units * tl.program_id(0) // tl.num_programs(0)
    last = units * (tl.program_id(0) + 1) // tl.num_programs(0)
    rows = tl.arange(0, TILE)
    factor = 1.0
    waited = 0
    _, part, _, local_a, local_b, _, _, scale_a, scale_b, _ = _where(
        first, code0, code1, code2, scale0, scale1, scale2, rows0, rows1, total, TILE, UNITS, MODE
    )
    factor_a = _scales(scales + scale_a, local_a, part, runs, TILE, RUNS, RUN)
    factor_b = _scales(scales + scale_b, local_b, part, runs, TILE, RUNS, RUN)
    for unit in tl.range(first, last, num_stages=STAGES):
        tile, part, row, local_a, local_b, code_a, code_b, scale_a, scale_b, slot_b = _where(
            unit, code0, code1, code2, scale0, scale1, scale2, rows0, rows1, total, TILE, UNITS, MODE
        )  # fmt: skip
        word = part * RUNS * WORDS
        a = _words(words + code_a, local_a, word, stride, TILE, RUNS * WORDS)
        b = _words(words + code_b, local_b, word, stride, TILE, RUNS * WORDS)
        # Scales are too small for the ring: those of the next unit are loaded into registers.
        now_a, now_b = factor_a, factor_b
        _, next_part, _, local_a, local_b, _, _, scale_a, scale_b, _ = _where(
            tl.minimum(unit + 1, last - 1), code0, code1, code2, scale0, scale1, scale2, rows0, rows1,
            total, TILE, UNITS, MODE,
        )  # fmt: skip
        factor_a = _scales(scales + scale_a, local_a, next_part, runs, TILE, RUNS, RUN)
        factor_b = _scales(scales + scale_b, local_b, next_part, runs, TILE, RUNS, RUN)
        if PDL:  # noqa: SIM102
            if unit == first:
                # From here on what the kernel before has written is read. That x is read later is said
                # by its address: the compiler moves a branch of which it needs nothing yet.
                waited = _say("griddepcontrol.wait;")
                _say("griddepcontrol.launch_dependents;")
        sum_a, sum_b = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
        # Always so; but x must not go through the ring, where it would be read before the wait.
        if unit < units:
            sum_a, sum_b = _unit(
                a, b, now_a, now_b, planes + waited * 4, word, stride, TILE, RUNS, WORDS, ASM
            )
        if NORM:  # noqa: SIM102
            if unit == first:  # not before x is read: that would wait for it
                factor = factor_of(sums + waited, sum_count, K, eps, SUMS)
        at_a, at_b = parts + row + rows, parts + slot_b + rows
        tl.store(at_a + part * slots, sum_a)
        tl.store(at_b + part * slots, sum_b)
        if (part == UNITS - 1) | (unit == last - 1):
            if ASM:
                _say("bar.sync 0;")  # all threads have stored before one of them reads or counts
            begin = tile * UNITS
            mine = part + 1 - tl.maximum(first - begin, 0)
            complete = mine == UNITS
            if not complete:
                complete = tl.atomic_add(counters + tile, mine, sem="acq_rel") + mine == UNITS
                if complete:
                    tl.store(counters + tile, 0)
            if complete:
                a_all = _all_units(at_a, slots, UNITS, TILE) * factor
                b_all = _all_units(at_b, slots, UNITS, TILE) * factor
                _end(
                    a_all, b_all, row, total, K, bias, y, sums, sum_count, eps, hidden, norm,
                    next_planes, next_sums, tile, TILE, BIAS, MODE, False, SUMS,
                )  # fmt: skip


@triton.jit
def _scales(scales, local, part, runs, TILE: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scales [TILE, RUNS] of a unit; beyond the row that of its last run again: x is 0 there."""
    there = tl.minimum(part * RUNS + tl.arange(0, RUNS), runs - 1)
    index = tl.arange(0, TILE)[:, None] * runs + there[None, :]
    if RUN == 128:
        return tl.load(scales + local * runs + index)
    return tl.load(scales + (local * runs + index) * RUN // 128)


@triton.jit
def _words(words, local, first, stride, TILE: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """SIZE words of each row; beyond the row its last four again: x is 0 there."""
    column = first + tl.arange(0, SIZE)
    column = tl.minimum(column // 4, stride // 4 - 1) * 4 + column % 4
    index = tl.arange(0, TILE)[:, None] * stride + column[None, :]
    return tl.load(words + local * stride + index, cache_modifier=".cg")
