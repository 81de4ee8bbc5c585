"""The products of one token with packed weights, and what a decoding step does between them.

y = W x, where W [N, K] is INT4 in blocks of 128 with bf16 scales, read once, as it is packed; codes become
floats in registers, products are accumulated in fp32. x comes spread over planes: eight codes of a 32-bit
word become floats by placing each nibble in the mantissa of 128 (an idea of Kim et al., "Who Says Elephants
Can't Run", 2022), so element j of every eight lies in plane j, and plane 8 holds what the codes of a word
are too large by, all together. Whoever computes x writes it in that form. What follows a product (bias,
residual, gate, the next norm's weights) is done by the program that has the row, so that a layer of a
Qwen2 is four products and one attention.

Where there are few rows, K is split; the last program of a row to finish adds the parts in their fixed
order, so that results do not depend on timing (stream-K's fix-up, Osama et al., 2023). Programmatic
dependent launch (``PDL``, compute capability 9.0) lets a kernel load its first codes while the one before
it ends.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PLAIN = tl.constexpr(0)  # y = W x + bias
RESIDUAL = tl.constexpr(
    1
)  # hidden += W x; hidden times the next norm's weights, spread; squares summed
GLU = tl.constexpr(2)  # silu(W0 x) * (W1 x), spread


@triton.jit
def _pair(word, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two codes of each word as floats, 128 + 8 too large."""
    pair = ((word >> SHIFT) & 0x000F000F) ^ 0x43084308  # two bf16: 128 + (code + 8)
    low = (pair << 16).to(tl.float32, bitcast=True)
    high = (pair & -65536).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _eight(word, x0, x1, x2, x3, x4, x5, x6, x7, x8):  # type: ignore[no-untyped-def]
    """The eight codes of each word times their elements of x. A word's bytes come lowest first, in each
    the odd element low: nibble j is element j ^ 1, and nibbles j and j + 4 are taken together."""
    low, high = _pair(word, 0)
    product = tl.fma(high, x5, tl.fma(low, x1, -x8))
    low, high = _pair(word, 4)
    product = tl.fma(high, x4, tl.fma(low, x0, product))
    low, high = _pair(word, 8)
    product = tl.fma(high, x7, tl.fma(low, x3, product))
    low, high = _pair(word, 12)
    return tl.fma(high, x6, tl.fma(low, x2, product))


@triton.jit
def _spread(value, first, planes, words, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write ``value`` [ROWS], elements from ``first`` on (a multiple of 8), into planes [9, words]."""
    element = first + tl.arange(0, ROWS)
    tl.store(planes + (element % 8) * words + element // 8, value)
    eights = tl.reshape(value, (ROWS // 8, 8))
    tl.store(planes + 8 * words + first // 8 + tl.arange(0, ROWS // 8), tl.sum(eights, 1) * 136.0)


@triton.jit
def _end(  # type: ignore[no-untyped-def]
    a, b, row, total, K, bias, y, sums, sum_count, eps, hidden, norm, next_planes, next_sums, pid,
    TILE: tl.constexpr, BIAS: tl.constexpr, MODE: tl.constexpr, NORM: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """What is done with the finished rows, a [TILE] and b [TILE]."""
    rows = row + tl.arange(0, TILE)
    if NORM:
        index = tl.arange(0, SUMS)
        squares = tl.sum(tl.load(sums + index, mask=index < sum_count, other=0.0), 0)
        factor = tl.rsqrt(squares / K + eps)
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
    DEEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program multiplies two tiles of TILE rows with its part of K, RUNS runs of RUN (64 or 128) at a
    time; with two tiles x is loaded half as often. RESIDUAL and GLU take one and two weights.

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
        row = pid * 2 * TILE
        second, third = row >= rows0, row >= rows0 + rows1
        code_a = tl.where(third, code2, tl.where(second, code1, code0))
        scale_a = tl.where(third, scale2, tl.where(second, scale1, scale0))
        local = (row - tl.where(third, rows0 + rows1, tl.where(second, rows0, 0))).to(tl.int64)
        code_b, scale_b = code_a, scale_a
        local_b = local + TILE
        slot_b = row + TILE
        slots = total
    runs = K // RUN
    stride = tl.multiple_of(K // 8, 8)  # words of a row
    per_part = tl.cdiv(tl.cdiv(runs, RUNS), SPLIT) * RUNS
    rows, word = tl.arange(0, TILE), tl.arange(0, WORDS)
    words_a = words + code_a + (local + rows)[:, None, None] * stride
    words_b = words + code_b + (local_b + rows)[:, None, None] * stride
    # Scales are loaded in the layout of the products: fewer elements than threads, so for free.
    first_a = ((local + rows) * runs)[:, None]
    first_b = ((local_b + rows) * runs)[:, None]
    acc_a = tl.zeros((TILE, RUNS, WORDS), tl.float32)
    acc_b = tl.zeros((TILE, RUNS, WORDS), tl.float32)
    first = part * per_part
    run = first + tl.arange(0, RUNS)
    column = run[:, None] * WORDS + word[None, :]
    there = (column < stride)[None, :, :]
    a = tl.load(words_a + column[None, :, :], mask=there, other=0, eviction_policy="evict_first")
    b = tl.load(words_b + column[None, :, :], mask=there, other=0, eviction_policy="evict_first")
    ahead = column + RUNS * WORDS
    there = (ahead < stride)[None, :, :]
    next_a = tl.load(
        words_a + ahead[None, :, :], mask=there, other=0, eviction_policy="evict_first"
    )
    next_b = tl.load(
        words_b + ahead[None, :, :], mask=there, other=0, eviction_policy="evict_first"
    )
    if PDL:
        gdc_wait()  # from here on what the kernel before has written is read
        gdc_launch_dependents()
    for _ in range(first, min(first + per_part, runs), RUNS):
        if DEEP:  # the codes of two turns are on their way while these are multiplied
            further = ahead + RUNS * WORDS
            there = (further < stride)[None, :, :]
            last_a = tl.load(
                words_a + further[None, :, :], mask=there, other=0, eviction_policy="evict_first"
            )
            last_b = tl.load(
                words_b + further[None, :, :], mask=there, other=0, eviction_policy="evict_first"
            )
        exists = (run < runs)[None, :]
        block_a = ((first_a + run[None, :]) * RUN) // 128
        block_b = ((first_b + run[None, :]) * RUN) // 128
        factor_a = tl.load(scales + scale_a + block_a, mask=exists, other=0.0).to(tl.float32)
        factor_b = tl.load(scales + scale_b + block_b, mask=exists, other=0.0).to(tl.float32)
        at, mask = planes + column, column < stride
        x0 = tl.load(at, mask=mask, other=0.0)[None, :, :]
        x1 = tl.load(at + stride, mask=mask, other=0.0)[None, :, :]
        x2 = tl.load(at + 2 * stride, mask=mask, other=0.0)[None, :, :]
        x3 = tl.load(at + 3 * stride, mask=mask, other=0.0)[None, :, :]
        x4 = tl.load(at + 4 * stride, mask=mask, other=0.0)[None, :, :]
        x5 = tl.load(at + 5 * stride, mask=mask, other=0.0)[None, :, :]
        x6 = tl.load(at + 6 * stride, mask=mask, other=0.0)[None, :, :]
        x7 = tl.load(at + 7 * stride, mask=mask, other=0.0)[None, :, :]
        x8 = tl.load(at + 8 * stride, mask=mask, other=0.0)[None, :, :]
        acc_a = tl.fma(_eight(a, x0, x1, x2, x3, x4, x5, x6, x7, x8), factor_a[:, :, None], acc_a)
        acc_b = tl.fma(_eight(b, x0, x1, x2, x3, x4, x5, x6, x7, x8), factor_b[:, :, None], acc_b)
        a, b = next_a, next_b
        if DEEP:
            next_a, next_b, ahead = last_a, last_b, further
        else:
            ahead += RUNS * WORDS
            there = (ahead < stride)[None, :, :]
            next_a = tl.load(
                words_a + ahead[None, :, :], mask=there, other=0, eviction_policy="evict_first"
            )
            next_b = tl.load(
                words_b + ahead[None, :, :], mask=there, other=0, eviction_policy="evict_first"
            )
        column += RUNS * WORDS
        run += RUNS
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
    """x [K] to planes [9, K / 8] in fp32. SIZE elements a program, words = K / 8."""
    first = tl.program_id(0) * SIZE
    at = first + tl.arange(0, SIZE)
    value = tl.load(x + at, mask=at < words * 8, other=0.0).to(tl.float32)
    there = at < words * 8
    tl.store(planes + (at % 8) * words + at // 8, value, mask=there)
    total = tl.sum(tl.reshape(value, (SIZE // 8, 8)), 1) * 136.0
    eights = first // 8 + tl.arange(0, SIZE // 8)
    tl.store(planes + 8 * words + eights, total, mask=eights < words)


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
    qkv, cosines, sines, keys, values, position, planes, partial, counters, capacity, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, KV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the query heads of one key/value head over one chunk of the past; the last to finish
    puts the chunks together (flash-decoding, Dao et al., 2023). Rotates q and k, and writes k and v.

    operand   shape                            dtype        layout
    qkv       [(HEADS + 2 KV) DIM]             fp32         q, k, v of the new token, not yet rotated
    cosines   [any, DIM]                       bf16, fp16   by position; sines likewise
    keys      [KV, capacity, DIM]              bf16, fp16   contiguous; values likewise
    position  [1]                              int32        of the new token: how many are in the cache
    planes    [9, HEADS DIM / 8]               fp32         out, spread
    partial   [KV, CHUNKS, PADDED, DIM + 2]    fp32         scratch
    counters  [KV]                             int32        zeros, and left as zeros
    """
    head, chunk = tl.program_id(0), tl.program_id(1)
    here = tl.load(position)
    active = here // CHUNK + 1
    if PDL:
        gdc_launch_dependents()
    if chunk < active:
        dim, lane = tl.arange(0, DIM), tl.arange(0, PADDED)
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        past = (token < here)[:, None]
        at = head * capacity * DIM + token[:, None] * DIM + dim[None, :]
        key = tl.load(keys + at, mask=past, other=0.0)
        value = tl.load(values + at, mask=past, other=0.0)
        turned = (dim + DIM // 2) % DIM
        sign = tl.where(dim < DIM // 2, -1.0, 1.0)
        cosine = tl.load(cosines + here * DIM + dim).to(tl.float32)
        sine = tl.load(sines + here * DIM + dim).to(tl.float32) * sign
        if PDL:
            gdc_wait()
        row = (head * GROUP + lane)[:, None] * DIM
        real = (lane < GROUP)[:, None]
        q = tl.load(qkv + row + dim[None, :], mask=real, other=0.0)
        q_turned = tl.load(qkv + row + turned[None, :], mask=real, other=0.0)
        q = (q * cosine[None, :] + q_turned * sine[None, :]) * scale
        k_at = qkv + (HEADS + head) * DIM
        k = tl.load(k_at + dim) * cosine + tl.load(k_at + turned) * sine
        v = tl.load(qkv + (HEADS + KV + head) * DIM + dim)
        k, v = k.to(key.dtype), v.to(value.dtype)
        new = (token == here)[:, None]
        key = tl.where(new, k[None, :], key)
        value = tl.where(new, v[None, :], value)
        if chunk == active - 1:
            tl.store(keys + head * capacity * DIM + here * DIM + dim, k)
            tl.store(values + head * capacity * DIM + here * DIM + dim, v)
        scores = tl.dot(q.to(key.dtype), tl.trans(key))
        scores = tl.where((token <= here)[None, :], scores, float("-inf"))
        most = tl.max(scores, 1)
        weight = tl.exp(scores - most[:, None])
        total = tl.sum(weight, 1)
        out = tl.dot(weight.to(value.dtype), value)
        words = HEADS * DIM // 8
        if active == 1:
            out = out / total[:, None]
            _spread_heads(out, head, planes, words, GROUP, PADDED, DIM)
        else:
            mine = partial + ((head * CHUNKS + chunk) * PADDED + lane) * (DIM + 2)
            tl.store(mine[:, None] + dim[None, :], out)
            tl.store(mine + DIM, most)
            tl.store(mine + DIM + 1, total)
            tl.debug_barrier()
            if tl.atomic_add(counters + head, 1, sem="acq_rel") == active - 1:
                tl.store(counters + head, 0)
                most = tl.full((PADDED,), float("-inf"), tl.float32)
                total = tl.zeros((PADDED,), tl.float32)
                out = tl.zeros((PADDED, DIM), tl.float32)
                for other in range(active):
                    theirs = partial + ((head * CHUNKS + other) * PADDED + lane) * (DIM + 2)
                    there_most = tl.load(theirs + DIM, cache_modifier=".cg")
                    there_total = tl.load(theirs + DIM + 1, cache_modifier=".cg")
                    there_out = tl.load(
                        theirs[:, None] + dim[None, :], mask=real, other=0.0, cache_modifier=".cg"
                    )
                    largest = tl.maximum(most, there_most)
                    ours, others = tl.exp(most - largest), tl.exp(there_most - largest)
                    out = out * ours[:, None] + there_out * others[:, None]
                    total = total * ours + there_total * others
                    most = largest
                _spread_heads(out / total[:, None], head, planes, words, GROUP, PADDED, DIM)


@triton.jit
def _spread_heads(  # type: ignore[no-untyped-def]
    out, head, planes, words, GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr
):
    """out [PADDED, DIM], of which GROUP rows count, into planes."""
    lane, dim = tl.arange(0, PADDED), tl.arange(0, DIM)
    element = ((head * GROUP + lane) * DIM)[:, None] + dim[None, :]
    real = (lane < GROUP)[:, None]
    tl.store(planes + (element % 8) * words + element // 8, out, mask=real)
    sums = tl.sum(tl.reshape(out, (PADDED, DIM // 8, 8)), 2) * 136.0
    eights = ((head * GROUP + lane) * (DIM // 8))[:, None] + tl.arange(0, DIM // 8)[None, :]
    tl.store(planes + 8 * words + eights, sums, mask=real)
