"""The products of one token with packed weights, by programs that stay: what is lost between programs is not.

K is cut into parts of RUNS runs, the tiles of rows into slices; a program takes one part of one slice,
and there are as many programs as fit at once. So x of its part is read once and stays in registers, and
nothing is loaded in the loop but codes and scales. The codes of the next tiles are on their way to shared
memory (STAGES of them) while one is multiplied, the first of them before the kernel before has ended.

The last program of a slice to end adds up the parts (as in stream-K, Osama et al., 2023), for all rows of
the slice at once. They are added in the order of K, by whomever: so the result depends on K and RUNS
alone, not on how many programs there were. `engine.one_token` says how codes become floats.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.one_token import GLU, RESIDUAL, eight, factor_of, place, spread_before

TILE = 8  # rows of one load; a tile is two of them
UNIT = 1024  # elements of K in a part: 16 bytes of a row's codes for each thread of a warp


@triton.jit
def _say(instruction: tl.constexpr):  # type: ignore[no-untyped-def]
    """An instruction by name, and 0: Triton's own word for it would keep the loop from having a ring."""
    return tl.inline_asm_elementwise(
        instruction + " mov.b32 $0, 0;", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _x(planes, first, stride: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x of some words, [1, SIZE] of each plane, in the layout in which codes come; 0 beyond the row."""
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
def _where(  # type: ignore[no-untyped-def]
    tile, code0, code1, code2, scale0, scale1, scale2, rows0, rows1, total,
    TILE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Of a tile: its first row, and of both halves the first row in its weight, and where the weight's
    codes and scales are, and the second half's first row among the sums."""
    # One way out: distances beyond 2**31 come as int64, and all returns must be of the same types.
    if MODE == GLU:
        row = tile * TILE
        local_a = row.to(tl.int64)
        local_b, slot_b = local_a, total + row
        code_a, code_b, scale_a, scale_b = code0, code1, scale0, scale1
    else:
        row, local_a, code_a, scale_a = place(
            tile, rows0, rows1, code0, code1, code2, scale0, scale1, scale2, 2 * TILE
        )
        local_b, slot_b = local_a + TILE, row + TILE
        code_b, scale_b = code_a, scale_a
    return row, local_a, local_b, code_a, code_b, scale_a, scale_b, slot_b


@triton.jit
def ring_kernel(  # type: ignore[no-untyped-def]
    planes, words, scales, bias, y, parts, counters,
    code0, code1, code2, scale0, scale1, scale2, rows0, rows1, total, tiles,
    sums, sum_count, eps, hidden, norm, next_planes, next_sums,
    K: tl.constexpr, TILE: tl.constexpr, RUNS: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr, BIAS: tl.constexpr, RUN: tl.constexpr, MODE: tl.constexpr,
    NORM: tl.constexpr, SUMS: tl.constexpr, AT_ONCE: tl.constexpr, PDL: tl.constexpr,
    EARLY: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One of PARTS programs for each slice, the last of which finishes it, AT_ONCE rows at a time. RESIDUAL
    and GLU take one and two weights. EARLY: the kernel after may begin when all programs have begun, not
    only when x is there.

    operand      shape            dtype        layout
    planes       [9, K / 8]       fp32         x, spread
    words        any              int32        the codes of weight i begin at word ``code_i``, 16-byte
                                               aligned; the first of two codes in a byte's high nibble
    scales       any              bf16         the scales of weight i begin at ``scale_i``
    bias         [total]          bf16, fp16   contiguous, if BIAS
    y            [total]          any float    PLAIN: weight i's rows after those before it
    parts        [PARTS, rows]    fp32         scratch; rows: of all weights; PARTS: of RUNS runs in a row
    counters     [slices]         int32        zeros, and left as zeros
    sums         [sum_count]      fp32         if NORM: parts of the sum of x's squares; SUMS >= sum_count
    hidden       [total]          fp32         RESIDUAL: read and written
    norm         [total]          bf16, fp16   RESIDUAL: the weights of the norm that follows
    next_planes  [9, total / 8]   fp32         RESIDUAL, GLU: the next product's x, before its norm's factor
    next_sums    [tiles]          fp32         RESIDUAL: parts of the sum of hidden's squares
    """
    SIZE: tl.constexpr = RUNS * (RUN // 8)  # words
    runs: tl.constexpr = K // RUN
    stride: tl.constexpr = K // 8  # words of a row
    slots = 2 * total if MODE == GLU else total
    this, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    slices = tl.num_programs(0) // PARTS
    first, last = tiles * this // slices, tiles * (this + 1) // slices
    rows = tl.arange(0, TILE)
    factor = 1.0
    x0 = tl.zeros((1, SIZE), tl.float32)
    x1, x2, x3, x4, x5, x6, x7, x8 = x0, x0, x0, x0, x0, x0, x0, x0
    _, local_a, local_b, _, _, scale_a, scale_b, _ = _where(
        first, code0, code1, code2, scale0, scale1, scale2, rows0, rows1, total, TILE, MODE
    )
    factor_a = _scales(scales + scale_a, local_a, part, runs, TILE, RUNS, RUN)
    factor_b = _scales(scales + scale_b, local_b, part, runs, TILE, RUNS, RUN)
    if PDL and EARLY:
        _say("griddepcontrol.launch_dependents;")
    for tile in tl.range(first, last, num_stages=STAGES):
        row, local_a, local_b, code_a, code_b, _, _, slot_b = _where(
            tile, code0, code1, code2, scale0, scale1, scale2, rows0, rows1, total, TILE, MODE
        )
        a = _words(words + code_a, local_a, part * SIZE, stride, TILE, SIZE)
        b = _words(words + code_b, local_b, part * SIZE, stride, TILE, SIZE)
        # Scales are too small for the ring: those of the next tile are loaded into registers.
        now_a, now_b = factor_a, factor_b
        _, local_a, local_b, _, _, scale_a, scale_b, _ = _where(
            tl.minimum(tile + 1, last - 1), code0, code1, code2, scale0, scale1, scale2, rows0, rows1,
            total, TILE, MODE,
        )  # fmt: skip
        factor_a = _scales(scales + scale_a, local_a, part, runs, TILE, RUNS, RUN)
        factor_b = _scales(scales + scale_b, local_b, part, runs, TILE, RUNS, RUN)
        # Here and not before the loop, where no codes are on their way yet.
        if tile == first:
            waited = 0
            if PDL:
                # From here on what the kernel before has written is read. That x is read later is said
                # by its address: the compiler moves what nothing is needed of yet.
                waited = _say("griddepcontrol.wait;")
                if not EARLY:
                    _say("griddepcontrol.launch_dependents;")
            x0, x1, x2, x3, x4, x5, x6, x7, x8 = _x(planes + waited * 4, part * SIZE, stride, SIZE)
            if NORM:
                factor = factor_of(sums + waited, sum_count, K, eps, SUMS)
        a = eight(a, x0, x1, x2, x3, x4, x5, x6, x7, x8, ASM)
        b = eight(b, x0, x1, x2, x3, x4, x5, x6, x7, x8, ASM)
        to = parts + part * slots + rows
        tl.store(to + row, _rows(a, now_a, TILE, RUNS, RUN // 8))
        tl.store(to + slot_b, _rows(b, now_b, TILE, RUNS, RUN // 8))
    if ASM:
        _say("bar.sync 0;")  # all threads have stored before one of them reads or counts
    complete = PARTS == 1
    if PARTS > 1:
        complete = tl.atomic_add(counters + this, 1, sem="acq_rel") == PARTS - 1
    if complete:
        if PARTS > 1:
            tl.store(counters + this, 0)
        HEIGHT: tl.constexpr = TILE if MODE == GLU else 2 * TILE
        _finish(
            parts, slots, first * HEIGHT, last * HEIGHT, total, factor, bias, y, hidden, norm,
            next_planes, next_sums, HEIGHT, AT_ONCE, PARTS, BIAS, MODE,
        )  # fmt: skip


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    parts, slots, first, last, total, factor, bias, y, hidden, norm, next_planes, next_sums,
    HEIGHT: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """What is done with the rows from ``first`` to ``last``, of which all parts are there, ROWS of them at
    a time."""
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        there = row < last
        if MODE == GLU:
            a = _all_parts(parts + row, slots, there, PARTS, ROWS) * factor
            b = _all_parts(parts + total + row, slots, there, PARTS, ROWS) * factor
            spread_before(a * tl.sigmoid(a) * b, start, last, next_planes, total // 8, ROWS)
        elif MODE == RESIDUAL:
            old = tl.load(hidden + row, mask=there, other=0.0)
            weight = tl.load(norm + row, mask=there, other=0.0).to(tl.float32)
            a = old + _all_parts(parts + row, slots, there, PARTS, ROWS) * factor
            tl.store(hidden + row, a, mask=there)
            squares = tl.sum(tl.reshape(a * a, (ROWS // HEIGHT, HEIGHT)), 1)
            tile = start // HEIGHT + tl.arange(0, ROWS // HEIGHT)
            tl.store(next_sums + tile, squares, mask=tile * HEIGHT < last)
            spread_before(a * weight, start, last, next_planes, total // 8, ROWS)
        else:
            a = _all_parts(parts + row, slots, there, PARTS, ROWS) * factor
            if BIAS:
                a += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)
            tl.store(y + row, a.to(y.dtype.element_ty), mask=there)


@triton.jit
def _all_parts(parts, slots, there, PARTS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The parts of rows, [ROWS] from ``parts`` on, added in their order: which one `tl.sum` takes is not
    said, and may be another in each mode."""
    AT_ONCE: tl.constexpr = min(PARTS, 32)
    sums = tl.zeros((ROWS,), tl.float32)
    for first in range(0, PARTS, AT_ONCE):
        for part in tl.static_range(AT_ONCE):
            mask = there & (first + part < PARTS)
            at = parts + (first + part) * slots
            sums += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    return sums


@triton.jit
def _scales(  # type: ignore[no-untyped-def]
    scales, local, part, runs: tl.constexpr,
    TILE: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The scales [TILE, RUNS] of a tile; beyond the row that of its last run again: x is 0 there."""
    there = tl.minimum(part * RUNS + tl.arange(0, RUNS), runs - 1)
    index = tl.arange(0, TILE)[:, None] * runs + there[None, :]
    if RUN == 128:
        return tl.load(scales + local * runs + index)
    return tl.load(scales + (local * runs + index) * RUN // 128)


@triton.jit
def _words(words, local, first, stride: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """SIZE words of each row; beyond the row its last four again: x is 0 there."""
    column = first + tl.arange(0, SIZE)
    column = tl.minimum(column // 4, stride // 4 - 1) * 4 + column % 4
    index = tl.arange(0, TILE)[:, None] * stride + column[None, :]
    return tl.load(words + local * stride + index, cache_modifier=".cg")
