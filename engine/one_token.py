"""The products of one token with packed weights, and what a decoding step does between them.

y = W x, where W [N, K] is INT4 in blocks of 128 with bf16 scales, read once, as it is packed; codes become
floats in registers, products are accumulated in fp32. x comes spread over planes: eight codes of a 32-bit
word become floats by placing each nibble in the mantissa of 128 (an idea of Kim et al., "Who Says Elephants
Can't Run", 2022), so element j of every eight lies in plane j, and plane 8 holds what the codes of a word
are too large by, all together. Whoever computes x writes it in that form. What follows a product (bias,
residual, gate, the next norm's weights) is done by the program that has the row, so that a layer of a
Qwen2 is four products and two launches of attention.

Where there are few rows, K is split; the last program of a row to finish adds the parts in their fixed
order, so that results do not depend on timing (stream-K's fix-up, Osama et al., 2023). Programmatic
dependent launch (``PDL``, compute capability 9.0) lets a kernel load its first codes while the one before
it ends.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

#: See `_spread`: what the exponent bits of the low half add to the high code, 0x4300 / 2**16 - 128 / 2**16.
OFFSET = tl.constexpr(0.259765625)
PLAIN = tl.constexpr(0)  # y = W x + bias
RESIDUAL = tl.constexpr(
    1
)  # hidden += W x; hidden times the next norm's weights, spread; squares summed
GLU = tl.constexpr(2)  # silu(W0 x) * (W1 x), spread


@triton.jit
def _pair(word, SHIFT: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two codes of each word as floats: 136 + the low one, and what `_spread` says of the high one."""
    # Two bf16: 128 + (code + 8). Both operations are one instruction, which compilers do not find.
    if ASM:
        pair = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x000F000F, 0x43084308, 0x6A;", "=r,r", [word >> SHIFT],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        pair = ((word >> SHIFT) & 0x000F000F) ^ 0x43084308
    return (pair << 16).to(tl.float32, bitcast=True), pair.to(tl.float32, bitcast=True)


@triton.jit
def _eight(  # type: ignore[no-untyped-def]
    word, x0, x1, x2, x3, x4, x5, x6, x7, x8, ASM: tl.constexpr
):
    """The eight codes of each word times their elements of x. A word's bytes come lowest first, in each
    the odd element low: nibble j is element j ^ 1, and nibbles j and j + 4 are taken together."""
    low, high = _pair(word, 0, ASM)
    product = tl.fma(high, x5, tl.fma(low, x1, -x8))
    low, high = _pair(word, 4, ASM)
    product = tl.fma(high, x4, tl.fma(low, x0, product))
    low, high = _pair(word, 8, ASM)
    product = tl.fma(high, x7, tl.fma(low, x3, product))
    low, high = _pair(word, 12, ASM)
    return tl.fma(high, x6, tl.fma(low, x2, product))


@triton.jit
def _codes(words, scales, first, run, runs, RUN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The words [rows, runs, words] of some runs, and their scales [rows, runs]. Beyond the row it is
    those of the last run again: nobody reads them, or x is 0 there.

    Scales are fewer than threads, so they are loaded in the layout of the products, for free. Codes are
    read once: they pass by the L1 cache, which x needs."""
    WORDS: tl.constexpr = RUN // 8
    there = tl.minimum(run, runs - 1)
    column = there[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    data = tl.load(words + column[None, :, :], cache_modifier=".cg")
    return data, tl.load(scales + ((first + there[None, :]) * RUN) // 128)


@triton.jit
def _planes(planes, run, stride, RUN: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """x of some runs, [1, runs, words] of each plane; 0 beyond the row, where there may be none if EVEN."""
    WORDS: tl.constexpr = RUN // 8
    column = run[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    at, mask = planes + column, column < stride
    return (
        _plane(at, mask, EVEN),
        _plane(at + stride, mask, EVEN),
        _plane(at + 2 * stride, mask, EVEN),
        _plane(at + 3 * stride, mask, EVEN),
        _plane(at + 4 * stride, mask, EVEN),
        _plane(at + 5 * stride, mask, EVEN),
        _plane(at + 6 * stride, mask, EVEN),
        _plane(at + 7 * stride, mask, EVEN),
        _plane(at + 8 * stride, mask, EVEN),
    )


@triton.jit
def _plane(at, mask, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.load(at) if EVEN else tl.load(at, mask=mask, other=0.0)
    return x[None, :, :]


@triton.jit
def _spread(value, first, planes, words, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write ``value`` [ROWS], elements from ``first`` on (a multiple of 8), into planes [9, words].

    The high code of a pair is read with the low one still in the lowest bits of its mantissa, which saves
    an instruction a code: as 136 + high + 0.259765625 + (136 + low) / 2**16, exactly. So what the low
    code's element is multiplied with is less by the high one's x / 2**16, and the offset is larger.
    """
    halves = tl.reshape(value, (ROWS // 8, 2, 4))
    low, high = tl.split(tl.trans(halves, (0, 2, 1)))  # elements 0 to 3 of every eight, and 4 to 7
    eights = first // 8 + tl.arange(0, ROWS // 8)
    at = planes + tl.arange(0, 4)[None, :] * words + eights[:, None]
    tl.store(at, low - high * 0.0000152587890625)
    tl.store(at + 4 * words, high)
    tl.store(planes + 8 * words + eights, _offset(low, high))


@triton.jit
def _offset(low, high):  # type: ignore[no-untyped-def]
    """What the codes of a word are too large by, all together; low and high [words, 4]."""
    return tl.sum((low + high) * 136.0 + high * OFFSET, 1)


@triton.jit
def place(  # type: ignore[no-untyped-def]
    pid, rows0, rows1, code0, code1, code2, scale0, scale1, scale2, ROWS: tl.constexpr
):
    """Which weight a program works on: where its codes and scales are, and its first row there."""
    row = pid * ROWS
    second = row >= rows0
    third = row >= rows0 + rows1
    code = tl.where(third, code2, tl.where(second, code1, code0))
    scale = tl.where(third, scale2, tl.where(second, scale1, scale0))
    local = row - tl.where(third, rows0 + rows1, tl.where(second, rows0, 0))
    return row, local.to(tl.int64), code, scale


@triton.jit
def factor_of(sums, sum_count, K, eps, SUMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a norm multiplies all of x with, from the parts of the sum of its squares."""
    index = tl.arange(0, SUMS)
    squares = tl.sum(tl.load(sums + index, mask=index < sum_count, other=0.0), 0)
    return tl.rsqrt(squares / K + eps)


@triton.jit
def _end(  # type: ignore[no-untyped-def]
    a, b, row, total, K, bias, y, sums, sum_count, eps, hidden, norm, next_planes, next_sums, pid,
    TILE: tl.constexpr, BIAS: tl.constexpr, MODE: tl.constexpr, NORM: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """What is done with the finished rows, a [TILE] and b [TILE]."""
    rows = row + tl.arange(0, TILE)
    if NORM:
        factor = factor_of(sums, sum_count, K, eps, SUMS)
        a, b = a * factor, b * factor
    if MODE == GLU:
        _spread(a * tl.sigmoid(a) * b, row, next_planes, total // 8, TILE)
    elif MODE == RESIDUAL:
        a += tl.load(hidden + rows)
        b += tl.load(hidden + rows + TILE)
        tl.store(hidden + rows, a)
        tl.store(hidden + rows + TILE, b)
        tl.store(next_sums + pid, tl.sum(a * a, 0) + tl.sum(b * b, 0))
        _spread(a * tl.load(norm + rows).to(tl.float32), row, next_planes, total // 8, TILE)
        norm_b = tl.load(norm + rows + TILE).to(tl.float32)
        _spread(b * norm_b, row + TILE, next_planes, total // 8, TILE)
    else:
        if BIAS:
            a += tl.load(bias + rows).to(tl.float32)
            b += tl.load(bias + rows + TILE).to(tl.float32)
        tl.store(y + rows, a.to(y.dtype.element_ty))
        tl.store(y + rows + TILE, b.to(y.dtype.element_ty))


@triton.jit
def product_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915
    planes, words, scales, bias, y, parts, counters,
    code0, code1, code2, scale0, scale1, scale2, rows0, rows1, total, K,
    sums, sum_count, eps, hidden, norm, next_planes, next_sums,
    TILE: tl.constexpr, RUNS: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
    RUN: tl.constexpr, MODE: tl.constexpr, NORM: tl.constexpr, SUMS: tl.constexpr,
    EVEN: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program multiplies two tiles of TILE rows with its part of K, RUNS runs of RUN (64 or 128) at a
    time; with two tiles x is loaded half as often. RESIDUAL and GLU take one and two weights. EVEN: K is a
    multiple of 2 RUNS RUN.

    operand      shape            dtype        layout
    planes       [9, K / 8]       fp32         x, spread
    words        any              int32        the codes of weight i begin at word ``code_i``, 16-byte
                                               aligned; the first of two codes in a byte's high nibble
    scales       any              bf16         the scales of weight i begin at ``scale_i``
    bias         [total]          bf16, fp16   contiguous, if BIAS
    y            [total]          any float    PLAIN: weight i's rows after those before it
    parts        [SPLIT, rows]    fp32         scratch; rows: of all weights
    counters     [programs]       int32        zeros, and left as zeros
    sums         [sum_count]      fp32         if NORM: parts of the sum of x's squares; SUMS >= sum_count
    hidden       [total]          fp32         RESIDUAL: read and written
    norm         [total]          bf16, fp16   RESIDUAL: the weights of the norm that follows
    next_planes  [9, total / 8]   fp32         RESIDUAL, GLU: the next product's x, before its norm's factor
    next_sums    [programs]       fp32         RESIDUAL: parts of the sum of hidden's squares
    """
    WORDS: tl.constexpr = RUN // 8
    pid, part = tl.program_id(0), tl.program_id(1)
    if MODE == GLU:
        row = pid * TILE
        local = row.to(tl.int64)
        code_a, code_b, scale_a, scale_b = code0, code1, scale0, scale1
        local_b = local
        slot_b = total + row
        slots = 2 * total
    else:
        row, local, code_a, scale_a = place(
            pid, rows0, rows1, code0, code1, code2, scale0, scale1, scale2, 2 * TILE
        )
        code_b, scale_b = code_a, scale_a
        local_b = local + TILE
        slot_b = row + TILE
        slots = total
    runs = K // RUN
    stride = tl.multiple_of(K // 8, 8)  # words of a row
    per_part = tl.cdiv(tl.cdiv(runs, 2 * RUNS), SPLIT) * 2 * RUNS
    first = part * per_part
    rows = tl.arange(0, TILE)
    words_a = words + code_a + (local + rows)[:, None, None] * stride
    words_b = words + code_b + (local_b + rows)[:, None, None] * stride
    scales_a, scales_b = scales + scale_a, scales + scale_b
    first_a = ((local + rows) * runs)[:, None]
    first_b = ((local_b + rows) * runs)[:, None]
    acc_a = tl.zeros((TILE, RUNS, WORDS), tl.float32)
    acc_b = tl.zeros((TILE, RUNS, WORDS), tl.float32)
    run = first + tl.arange(0, RUNS)
    a0, factor_a0 = _codes(words_a, scales_a, first_a, run, runs, RUN)
    b0, factor_b0 = _codes(words_b, scales_b, first_b, run, runs, RUN)
    a1, factor_a1 = _codes(words_a, scales_a, first_a, run + RUNS, runs, RUN)
    b1, factor_b1 = _codes(words_b, scales_b, first_b, run + RUNS, runs, RUN)
    if PDL:
        gdc_wait()  # from here on what the kernel before has written is read
        gdc_launch_dependents()
    # Two turns at a time, each with registers of its own, so that none has to be moved: while the codes
    # of one are multiplied, those of the next two are on their way.
    for _ in range(first, min(first + per_part, runs), 2 * RUNS):
        x0, x1, x2, x3, x4, x5, x6, x7, x8 = _planes(planes, run, stride, RUN, EVEN)
        scaled_a, scaled_b = (
            factor_a0.to(tl.float32)[:, :, None],
            factor_b0.to(tl.float32)[:, :, None],
        )
        acc_a = tl.fma(_eight(a0, x0, x1, x2, x3, x4, x5, x6, x7, x8, ASM), scaled_a, acc_a)
        acc_b = tl.fma(_eight(b0, x0, x1, x2, x3, x4, x5, x6, x7, x8, ASM), scaled_b, acc_b)
        a0, factor_a0 = _codes(words_a, scales_a, first_a, run + 2 * RUNS, runs, RUN)
        b0, factor_b0 = _codes(words_b, scales_b, first_b, run + 2 * RUNS, runs, RUN)
        x0, x1, x2, x3, x4, x5, x6, x7, x8 = _planes(planes, run + RUNS, stride, RUN, EVEN)
        scaled_a, scaled_b = (
            factor_a1.to(tl.float32)[:, :, None],
            factor_b1.to(tl.float32)[:, :, None],
        )
        acc_a = tl.fma(_eight(a1, x0, x1, x2, x3, x4, x5, x6, x7, x8, ASM), scaled_a, acc_a)
        acc_b = tl.fma(_eight(b1, x0, x1, x2, x3, x4, x5, x6, x7, x8, ASM), scaled_b, acc_b)
        a1, factor_a1 = _codes(words_a, scales_a, first_a, run + 3 * RUNS, runs, RUN)
        b1, factor_b1 = _codes(words_b, scales_b, first_b, run + 3 * RUNS, runs, RUN)
        run += 2 * RUNS
    a = tl.sum(tl.sum(acc_a, 2), 1)
    b = tl.sum(tl.sum(acc_b, 2), 1)
    if SPLIT > 1:
        at_a, at_b = row + rows, slot_b + rows
        tl.store(parts + part * slots + at_a, a)
        tl.store(parts + part * slots + at_b, b)
        tl.debug_barrier()  # all threads have stored before one of them counts
        if tl.atomic_add(counters + pid, 1, sem="acq_rel") == SPLIT - 1:
            a = tl.zeros_like(a)
            b = tl.zeros_like(b)
            for other in range(SPLIT):
                a += tl.load(parts + other * slots + at_a, cache_modifier=".cg")
                b += tl.load(parts + other * slots + at_b, cache_modifier=".cg")
            tl.store(counters + pid, 0)
            _end(
                a, b, row, total, K, bias, y, sums, sum_count, eps, hidden, norm, next_planes,
                next_sums, pid, TILE, BIAS, MODE, NORM, SUMS,
            )  # fmt: skip
    else:
        _end(
            a, b, row, total, K, bias, y, sums, sum_count, eps, hidden, norm, next_planes, next_sums,
            pid, TILE, BIAS, MODE, NORM, SUMS,
        )  # fmt: skip


@triton.jit
def spread_kernel(x, planes, words, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [K] to planes [9, K / 8] in fp32, as `_spread` says. SIZE elements a program, words = K / 8."""
    eights = tl.program_id(0) * (SIZE // 8) + tl.arange(0, SIZE // 8)
    four = tl.arange(0, 4)
    there = (eights < words)[:, None] & (four >= 0)[None, :]
    at = x + eights[:, None] * 8 + four[None, :]
    low = tl.load(at, mask=there, other=0.0).to(tl.float32)
    high = tl.load(at + 4, mask=there, other=0.0).to(tl.float32)
    to = planes + four[None, :] * words + eights[:, None]
    tl.store(to, low - high * 0.0000152587890625, mask=there)
    tl.store(to + 4 * words, high, mask=there)
    tl.store(planes + 8 * words + eights, _offset(low, high), mask=eights < words)


@triton.jit
def begin_kernel(  # type: ignore[no-untyped-def]
    x, norm, hidden, planes, sums, count, SIZE: tl.constexpr
):
    """x [count] to hidden, fp32 [count]; times the first norm's weights, spread; squares summed, a part
    a program of SIZE elements, which divide count."""
    first = tl.program_id(0) * SIZE
    at = first + tl.arange(0, SIZE)
    value = tl.load(x + at).to(tl.float32)
    tl.store(hidden + at, value)
    tl.store(sums + tl.program_id(0), tl.sum(value * value, 0))
    _spread(value * tl.load(norm + at).to(tl.float32), first, planes, count // 8, SIZE)


@triton.jit
def glu_kernel(gate, up, planes, count, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """silu(gate) * up, fp32 [count] each, spread; for when the two were not multiplied together."""
    first = tl.program_id(0) * SIZE
    at = first + tl.arange(0, SIZE)
    a, b = tl.load(gate + at), tl.load(up + at)
    _spread(a * tl.sigmoid(a) * b, first, planes, count // 8, SIZE)


@triton.jit
def attention_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915
    qkv, cosines, sines, keys, values, position, partial, peaks, capacity, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, KV: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: the query heads of one key/value head over one chunk of the past, TILES tiles of TILE
    tokens (flash-decoding, Dao et al., 2023). Rotates q and k, and writes k and v to the cache.

    operand   shape                            dtype        layout
    qkv       [(HEADS + 2 KV) DIM]             fp32         q, k, v of the new token, not yet rotated
    cosines   [any, DIM]                       bf16, fp16   by position; sines likewise
    keys      [KV, capacity, DIM]              bf16, fp16   contiguous; values likewise
    position  [1]                              int32        of the new token: how many are in the cache
    partial   [KV, CHUNKS, PADDED, DIM]        fp32         out: of each chunk, not yet divided
    peaks     [2, KV, PADDED, CHUNKS]          fp32         out: the largest score; the sum of weights
    """
    head, chunk = tl.program_id(0), tl.program_id(1)
    here = tl.load(position)
    if PDL:
        gdc_launch_dependents()
    start = chunk * TILE * TILES
    if start <= here:
        dim, lane = tl.arange(0, DIM), tl.arange(0, PADDED)
        turned = (dim + DIM // 2) % DIM
        cosine = tl.load(cosines + here * DIM + dim).to(tl.float32)
        sine = tl.load(sines + here * DIM + dim).to(tl.float32)
        sine = tl.where(dim < DIM // 2, -sine, sine)
        past = head * capacity * DIM
        token = start + tl.arange(0, TILE)
        at = past + token[:, None] * DIM + dim[None, :]
        key = tl.load(keys + at, mask=(token < here)[:, None], other=0.0)
        value = tl.load(values + at, mask=(token < here)[:, None], other=0.0)
        if PDL:
            gdc_wait()
        row = ((head * GROUP + lane) * DIM)[:, None]
        real = (lane < GROUP)[:, None]
        q = tl.load(qkv + row + dim[None, :], mask=real, other=0.0) * cosine[None, :]
        q += tl.load(qkv + row + turned[None, :], mask=real, other=0.0) * sine[None, :]
        q = (q * scale).to(key.dtype)
        k_at = qkv + (HEADS + head) * DIM
        k = (tl.load(k_at + dim) * cosine + tl.load(k_at + turned) * sine).to(key.dtype)
        v = tl.load(qkv + (HEADS + KV + head) * DIM + dim).to(value.dtype)
        if here < start + TILE * TILES:
            tl.store(keys + past + here * DIM + dim, k)
            tl.store(values + past + here * DIM + dim, v)
        most = tl.full((PADDED,), float("-inf"), tl.float32)
        total = tl.zeros((PADDED,), tl.float32)
        out = tl.zeros((PADDED, DIM), tl.float32)
        for _ in range(min(TILES, (here - start) // TILE + 1)):
            later = token + TILE
            at = past + later[:, None] * DIM + dim[None, :]
            next_key = tl.load(keys + at, mask=(later < here)[:, None], other=0.0)
            next_value = tl.load(values + at, mask=(later < here)[:, None], other=0.0)
            new = (token == here)[:, None]  # is not read from the cache: others write it just now
            key, value = tl.where(new, k[None, :], key), tl.where(new, v[None, :], value)
            scores = tl.dot(q, tl.trans(key))
            scores = tl.where((token <= here)[None, :], scores, float("-inf"))
            largest = tl.maximum(most, tl.max(scores, 1))
            weight = tl.exp(scores - largest[:, None])
            fade = tl.exp(most - largest)
            total = total * fade + tl.sum(weight, 1)
            out = out * fade[:, None] + tl.dot(weight.to(value.dtype), value)
            most, token, key, value = largest, later, next_key, next_value
        to = partial + (((head * CHUNKS + chunk) * PADDED + lane) * DIM)[:, None] + dim[None, :]
        tl.store(to, out, mask=real)
        peak = peaks + (head * PADDED + lane) * CHUNKS + chunk
        tl.store(peak, most, mask=lane < GROUP)
        tl.store(peak + KV * PADDED * CHUNKS, total, mask=lane < GROUP)


@triton.jit
def combine_kernel(  # type: ignore[no-untyped-def]
    partial, peaks, position, planes,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, KV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program puts the chunks of one query head together. planes: fp32 [9, HEADS DIM / 8], out,
    spread; the others as attention_kernel has them, CHUNK its TILE TILES."""
    query = tl.program_id(0)
    head, lane = query // GROUP, query % GROUP
    chunk, dim = tl.arange(0, CHUNKS), tl.arange(0, DIM)
    there = chunk <= tl.load(position) // CHUNK
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    peak = peaks + (head * PADDED + lane) * CHUNKS + chunk
    most = tl.load(peak, mask=there, other=float("-inf"))
    total = tl.load(peak + KV * PADDED * CHUNKS, mask=there, other=0.0)
    at = partial + ((head * CHUNKS + chunk) * PADDED + lane)[:, None] * DIM + dim[None, :]
    out = tl.load(at, mask=there[:, None], other=0.0)
    weight = tl.exp(most - tl.max(most, 0))
    result = tl.sum(out * weight[:, None], 0) / tl.sum(total * weight, 0)
    _spread(result, query * DIM, planes, HEADS * DIM // 8, DIM)
