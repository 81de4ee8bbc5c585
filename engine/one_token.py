"""What a decoding step of one token does beside its products, and how x and codes come together in those.

y = W x, where W [N, K] is INT4 in blocks of 128 with bf16 scales, read once, as it is packed; codes become
floats in registers, products are accumulated in fp32. x comes spread over planes: eight codes of a 32-bit
word become floats by placing each nibble in the mantissa of 128 (an idea of Kim et al., "Who Says Elephants
Can't Run", 2022), so element j of every eight lies in plane j, and plane 8 holds what the codes of a word
are too large by, all together. Whoever computes x writes it in that form. What follows a product (bias,
residual, gate, the next norm's weights) is done by the program that has the row, so that a layer of a
Qwen2 is four products (`engine.ring`) and two launches of attention.

Programmatic dependent launch (``PDL``, compute capability 9.0) lets a kernel load what it can while the
one before it ends.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

#: See `_store_planes`: what the exponent bits of the low half add to the high code,
#: 0x4300 / 2**16 - 128 / 2**16; and 2**-16, which is left of a low code in the high one's mantissa.
OFFSET = tl.constexpr(0.259765625)
LEFT = tl.constexpr(0.0000152587890625)
PLAIN = tl.constexpr(0)  # y = W x + bias
#: hidden += W x; hidden times the next norm's weights, spread; squares summed
RESIDUAL = tl.constexpr(1)
GLU = tl.constexpr(2)  # silu(W0 x) * (W1 x), spread
WIDE_HEADS = 128  # elements: beyond, four warps have not the registers for attention


def attention_warps(dim: int) -> int:
    """Of a program of attention, by the elements of a head."""
    return 4 if dim <= WIDE_HEADS else 8


@triton.jit
def _pair(word, SHIFT: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two codes of each word as floats: 136 + the low one, and what `_store_planes` says of the high one."""
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
def eight(  # type: ignore[no-untyped-def]
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
def spread_before(value, first, last, planes, words, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write ``value`` [ROWS], elements from ``first`` on (a multiple of 8), into planes [9, words]; nothing
    of what begins with the element ``last``, another multiple of 8."""
    halves = tl.reshape(value, (ROWS // 8, 2, 4))
    low, high = tl.split(tl.trans(halves, (0, 2, 1)))  # elements 0 to 3 of every eight, and 4 to 7
    eights = first // 8 + tl.arange(0, ROWS // 8)
    _store_planes(low, high, eights, eights * 8 < last, planes, words)


@triton.jit
def _store_planes(low, high, eights, there, planes, words):  # type: ignore[no-untyped-def]
    """Write the elements low and high [n, 4] of every eight, ``eights`` [n], that are ``there`` [n].

    The high code of a pair is read with the low one still in the lowest bits of its mantissa, which saves
    an instruction a code: as 136 + high + 0.259765625 + (136 + low) / 2**16, exactly. So what the low
    code's element is multiplied with is less by the high one's x / 2**16, and the offset is larger.
    """
    four = tl.arange(0, 4)[None, :]
    at, mask = planes + four * words + eights[:, None], there[:, None] & (four >= 0)
    tl.store(at, low - high * LEFT, mask=mask)
    tl.store(at + 4 * words, high, mask=mask)
    # What the codes of a word are too large by, all together.
    tl.store(
        planes + 8 * words + eights, tl.sum((low + high) * 136.0 + high * OFFSET, 1), mask=there
    )


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
def spread_kernel(x, planes, words, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [K] to planes [9, K / 8] in fp32, as `_store_planes` says. SIZE elements a program, words = K / 8."""
    eights = tl.program_id(0) * (SIZE // 8) + tl.arange(0, SIZE // 8)
    four = tl.arange(0, 4)[None, :]
    there = eights < words
    at, mask = x + eights[:, None] * 8 + four, there[:, None] & (four >= 0)
    low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(at + 4, mask=mask, other=0.0).to(tl.float32)
    _store_planes(low, high, eights, there, planes, words)


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
    spread_before(value * tl.load(norm + at).to(tl.float32), first, count, planes, count // 8, SIZE)


@triton.jit
def glu_kernel(gate, up, planes, count, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """silu(gate) * up, fp32 [count] each, spread; for when the two were not multiplied together."""
    first = tl.program_id(0) * SIZE
    at = first + tl.arange(0, SIZE)
    a, b = tl.load(gate + at), tl.load(up + at)
    spread_before(a * tl.sigmoid(a) * b, first, count, planes, count // 8, SIZE)


@triton.jit
def attention_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915
    qkv, q_norm, k_norm, eps, cosines, sines, keys, values, position, partial, peaks, capacity, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, KV: tl.constexpr,
    HEAD_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the query heads of one key/value head over one chunk of the past, TILES tiles of TILE
    tokens (flash-decoding, Dao et al., 2023). Norms each head of q and k, if HEAD_NORM says so, rotates
    them, and writes k and v to the cache.

    operand   shape                            dtype        layout
    qkv       [(HEADS + 2 KV) DIM]             fp32         q, k, v of the new token, not yet rotated
    q_norm    [DIM]                            bf16, fp16   weights of the norm; k_norm likewise
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
        q_cosine, q_sine, k_cosine, k_sine = cosine, sine, cosine, sine
        if HEAD_NORM:
            q_cosine *= tl.load(q_norm + dim).to(tl.float32)
            q_sine *= tl.load(q_norm + turned).to(tl.float32)
            k_cosine *= tl.load(k_norm + dim).to(tl.float32)
            k_sine *= tl.load(k_norm + turned).to(tl.float32)
        past = head * capacity * DIM
        token = start + tl.arange(0, TILE)
        at = past + token[:, None] * DIM + dim[None, :]
        key = tl.load(keys + at, mask=(token < here)[:, None], other=0.0)
        value = tl.load(values + at, mask=(token < here)[:, None], other=0.0)
        if PDL:
            gdc_wait()
        row = ((head * GROUP + lane) * DIM)[:, None]
        real = (lane < GROUP)[:, None]
        straight = tl.load(qkv + row + dim[None, :], mask=real, other=0.0)
        q = straight * q_cosine[None, :]
        q += tl.load(qkv + row + turned[None, :], mask=real, other=0.0) * q_sine[None, :]
        k_at = qkv + (HEADS + head) * DIM
        k_straight = tl.load(k_at + dim)
        k = k_straight * k_cosine + tl.load(k_at + turned) * k_sine
        if HEAD_NORM:
            q *= tl.rsqrt(tl.sum(straight * straight, 1) / DIM + eps)[:, None]
            k *= tl.rsqrt(tl.sum(k_straight * k_straight, 0) / DIM + eps)
        q, k = (q * scale).to(key.dtype), k.to(key.dtype)
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
    spread_before(result, query * DIM, HEADS * DIM, planes, HEADS * DIM // 8, DIM)
