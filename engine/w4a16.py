"""Products of a few tokens with packed weights: fused W4A16 kernels and their checking launcher.

y = x @ W.T + b, where W [N, K] is INT4 in blocks of 128 with bf16 scales, read once, as it is packed;
codes become floats in registers, products are accumulated in fp32 and scaled there, and rounded once.
Up to three weights that share x are multiplied in one launch. Knows no slots and no sockets.

One token takes a kernel without tensor cores: eight codes of a 32-bit word become floats by placing each
nibble in the mantissa of 128 (an idea of Kim et al., "Who Says Elephants Can't Run", 2022). More tokens
take tensor cores, the even and the odd elements apart, so that no code has to change its lane. Where
there are fewer rows than multiprocessors, K is split; the last program of a row to finish adds the
parts in their fixed order, so that the result does not depend on timing (stream-K's fix-up, Osama et
al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from common.blocks import BLOCK, code_bytes, scale_count
from common.dequantize import interpreted
from common.formats import RUN
from engine.packed import MAX_FUSED_TOKENS as MAX_TOKENS
from engine.packed import Packed

MAX_WEIGHTS = 3


@dataclass(frozen=True)
class Config:
    """How a product is cut: rows and runs (of 128) of a program, parts of K, warps, stages."""

    rows: int
    runs: int
    split: int
    warps: int
    stages: int = 1


@triton.jit
def _place(  # type: ignore[no-untyped-def]
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
def _finish(  # type: ignore[no-untyped-def]
    acc, columns, rows, mask, bias, y, parts, counters, pid, part, total, stride,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Writes acc [rows, columns] (or, split, adds up the parts when the last has come)."""
    at = columns[None, :] * total + rows[:, None]
    if SPLIT > 1:
        size = TOKENS * total
        tl.store(parts + part * size + at, acc, mask=mask)
        tl.debug_barrier()  # all threads have stored before one of them counts
        arrived = tl.atomic_add(counters + pid, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            acc = tl.zeros_like(acc)
            for other in range(SPLIT):
                acc += tl.load(
                    parts + other * size + at, mask=mask, other=0.0, cache_modifier=".cg"
                )
            tl.store(counters + pid, 0)
            if BIAS:
                acc += tl.load(bias + rows).to(tl.float32)[:, None]
            to = columns[None, :] * stride + rows[:, None]
            tl.store(y + to, acc.to(y.dtype.element_ty), mask=mask)
    else:
        if BIAS:
            acc += tl.load(bias + rows).to(tl.float32)[:, None]
        to = columns[None, :] * stride + rows[:, None]
        tl.store(y + to, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _spread_one_kernel(x, planes, words, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [K] to planes [9, K / 8] in fp32: element j of each word's eight in plane j, and their sum
    times 136, which is what the codes of a word are too large by, all together."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = at < words
    total = tl.zeros((SIZE,), tl.float32)
    for j in tl.static_range(8):
        value = tl.load(x + at * 8 + j, mask=there, other=0.0).to(tl.float32)
        tl.store(planes + j * words + at, value, mask=there)
        total += value
    tl.store(planes + 8 * words + at, total * 136.0, mask=there)


@triton.jit
def _pair(word, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two codes of each word as floats, 128 + 8 too large: each nibble is put into the mantissa of 128."""
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
def _one_token_kernel(  # type: ignore[no-untyped-def]
    planes, words, scales, bias, y, parts, counters,
    code0, code1, code2, scale0, scale1, scale2, rows0, rows1, total, K,
    ROWS: tl.constexpr, RUNS: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """One program multiplies ROWS rows with its part of K, RUNS runs of RUN (64 or 128) at a time, in
    two tiles, so that x is loaded half as often.

    operand   shape            dtype        layout
    planes    [9, K / 8]       fp32         as _spread_one_kernel makes them
    words     any              int32        the codes of weight i begin at word ``code_i``, 16-byte aligned;
                                            the first of two codes in a byte's high nibble
    scales    any              bf16         the scales of weight i begin at ``scale_i``
    bias      [total]          as y         contiguous, if BIAS
    y         [total]          bf16, fp16   contiguous; weight i's rows after those before it
    parts     [SPLIT, total]   fp32         scratch
    counters  [total / ROWS]   int32        zeros, and left as zeros
    """
    WORDS: tl.constexpr = RUN // 8
    TILE: tl.constexpr = ROWS // 2
    pid, part = tl.program_id(0), tl.program_id(1)
    row, local, code, scale = _place(
        pid, rows0, rows1, code0, code1, code2, scale0, scale1, scale2, ROWS
    )
    runs = K // RUN
    stride = tl.multiple_of(K // 8, 8)  # words of a row
    per_part = tl.cdiv(tl.cdiv(runs, RUNS), SPLIT) * RUNS
    rows, word = tl.arange(0, TILE), tl.arange(0, WORDS)
    words_a = words + code + (local + rows)[:, None, None] * stride
    words_b = words_a + TILE * stride
    # The scales are loaded in the layout of the products: fewer elements than threads, so for free.
    scales_a = scales + scale
    first_a = ((local + rows) * runs)[:, None]
    first_b = first_a + TILE * runs
    acc_a = tl.zeros((TILE, RUNS, WORDS), tl.float32)
    acc_b = tl.zeros((TILE, RUNS, WORDS), tl.float32)
    first, last = part * per_part, min((part + 1) * per_part, runs)
    run = first + tl.arange(0, RUNS)
    column = run[:, None] * WORDS + word[None, :]
    there = (column < stride)[None, :, :]
    a = tl.load(words_a + column[None, :, :], mask=there, other=0, eviction_policy="evict_first")
    b = tl.load(words_b + column[None, :, :], mask=there, other=0, eviction_policy="evict_first")
    for _ in range(first, last, RUNS):
        ahead = column + RUNS * WORDS  # the next codes are on their way while these are multiplied
        there = (ahead < stride)[None, :, :]
        next_a = tl.load(
            words_a + ahead[None, :, :], mask=there, other=0, eviction_policy="evict_first"
        )
        next_b = tl.load(
            words_b + ahead[None, :, :], mask=there, other=0, eviction_policy="evict_first"
        )
        exists = (run < runs)[None, :]
        block_a, block_b = (
            ((first_a + run[None, :]) * RUN) // 128,
            ((first_b + run[None, :]) * RUN) // 128,
        )
        factor_a = tl.load(scales_a + block_a, mask=exists, other=0.0).to(tl.float32)
        factor_b = tl.load(scales_a + block_b, mask=exists, other=0.0).to(tl.float32)
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
        a, b, column, run = next_a, next_b, ahead, run + RUNS
    columns = tl.zeros((1,), tl.int32)
    mask1 = tl.full((ROWS, 1), True, tl.int1)
    both = tl.join(tl.sum(tl.sum(acc_a, 2), 1), tl.sum(tl.sum(acc_b, 2), 1))
    result = tl.reshape(tl.trans(both), (ROWS,))[:, None]
    _finish(
        result, columns, row + tl.arange(0, ROWS), mask1, bias, y, parts, counters, pid, part, total,
        total, SPLIT, BIAS, 1,
    )  # fmt: skip


@triton.jit
def _unpack(pairs, ASM: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The high (even) and the low (odd) codes of bytes, as floats. Exact."""
    if ASM and dtype == tl.bfloat16:
        even, odd = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b;
            prmt.b32 a, $4, 0, 0x4140;
            prmt.b32 b, $4, 0, 0x4342;
            lop3.b32 $2, a, 0x000F000F, 0x43084308, 0x6A;
            lop3.b32 $3, b, 0x000F000F, 0x43084308, 0x6A;
            shr.u32 a, a, 4;
            shr.u32 b, b, 4;
            lop3.b32 $0, a, 0x000F000F, 0x43084308, 0x6A;
            lop3.b32 $1, b, 0x000F000F, 0x43084308, 0x6A;
            mov.b32 a, 0x3F803F80;
            mov.b32 b, 0xC308C308;
            fma.rn.bf16x2 $0, $0, a, b;
            fma.rn.bf16x2 $1, $1, a, b;
            fma.rn.bf16x2 $2, $2, a, b;
            fma.rn.bf16x2 $3, $3, a, b;
            }
            """,
            "=&r,=&r,=&r,=&r,r", [pairs], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        wide = pairs.to(tl.int32)
        even = (wide >> 4).to(dtype)
        odd = ((wide << 28) >> 28).to(dtype)
    return even, odd


@triton.jit
def _spread_kernel(x, planes, K, tokens, SIZE: tl.constexpr, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [tokens, K] to planes [2, TOKENS, K / 2]: the even elements, the odd ones; no token is 0."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    token = tl.program_id(1)
    half = K // 2
    there = at < half
    filled = at < tl.where(token < tokens, half, 0)
    for odd in tl.static_range(2):
        value = tl.load(x + token * K + at * 2 + odd, mask=filled, other=0.0)
        tl.store(planes + (odd * TOKENS + token) * half + at, value, mask=there)


@triton.jit
def _tokens_kernel(  # type: ignore[no-untyped-def]
    planes, pairs, scales, bias, y, parts, counters,
    code0, code1, code2, scale0, scale1, scale2, rows0, rows1, total, K, tokens,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, RUN: tl.constexpr,
    TOKENS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program multiplies ROWS rows with its part of K for all tokens, a run at a time.

    operand   shape                    dtype        layout
    planes    [2, TOKENS, K / 2]       bf16, fp16   as _spread_kernel makes them
    pairs     any                      int8         the codes of weight i begin at byte ``code_i``
    scales    any                      bf16         the scales of weight i begin at ``scale_i``
    bias      [total]                  as y         contiguous, if BIAS
    y         [tokens, total]          as planes    contiguous
    parts     [SPLIT, TOKENS, total]   fp32         scratch
    counters  [total / ROWS]           int32        zeros, and left as zeros
    """
    HALF: tl.constexpr = RUN // 2
    pid, part = tl.program_id(0), tl.program_id(1)
    row, local, code, scale = _place(
        pid, rows0, rows1, code0, code1, code2, scale0, scale1, scale2, ROWS
    )
    runs = K // RUN
    per_part = tl.cdiv(runs, SPLIT)
    rows = tl.arange(0, ROWS)
    half = tl.arange(0, HALF)
    token = tl.arange(0, TOKENS)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    at = pairs + code + ((local + rows) * (K // 2))[:, None] + half[None, :]
    first_run = (local + rows) * runs
    x_at = planes + token[None, :] * (K // 2) + half[:, None]
    for run in range(part * per_part, min((part + 1) * per_part, runs)):
        data = tl.load(at + run * HALF)
        factor = tl.load(scales + scale + ((first_run + run) * RUN) // 128).to(tl.float32)
        x_even = tl.load(x_at + run * HALF)
        x_odd = tl.load(x_at + TOKENS * (K // 2) + run * HALF)
        even, odd = _unpack(data, ASM, x_even.dtype)
        if not ASM:  # the interpreter multiplies no bf16
            even, odd = even.to(tl.float32), odd.to(tl.float32)
            x_even, x_odd = x_even.to(tl.float32), x_odd.to(tl.float32)
        product = tl.dot(even, x_even)
        product = tl.dot(odd, x_odd, product)
        acc += product * factor[:, None]
    mask = (rows >= 0)[:, None] & (token < tokens)[None, :]
    _finish(
        acc, token, row + rows, mask, bias, y, parts, counters, pid, part, total, total,
        SPLIT, BIAS, TOKENS,
    )  # fmt: skip


def spread(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] in the order in which the kernels read it; one more launch."""
    tokens, columns = x.shape
    if tokens == 1:
        words = columns // 8
        planes = torch.empty((9, words), dtype=torch.float32, device=x.device)
        _spread_one_kernel[(triton.cdiv(words, 256),)](x, planes, words, SIZE=256, num_warps=2)
        return planes
    planes = torch.empty((2, MAX_TOKENS, columns // 2), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(columns // 2, 512), MAX_TOKENS)
    _spread_kernel[grid](x, planes, columns, tokens, SIZE=512, TOKENS=MAX_TOKENS, num_warps=2)
    return planes


class Scratch:
    """What split products need between their programs, per device; grown when needed, never shrunk.

    One stream at a time may use it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.parts = torch.empty(0, dtype=torch.float32, device=device)
        self.counters = torch.zeros(0, dtype=torch.int32, device=device)

    def hold(self, parts: int, counters: int) -> None:
        """Make room for so many numbers."""
        if self.parts.numel() < parts:
            self.parts = torch.empty(parts, dtype=torch.float32, device=self._device)
        if self.counters.numel() < counters:
            self.counters = torch.zeros(counters, dtype=torch.int32, device=self._device)


def multiply(
    x: torch.Tensor,
    weights: list[Packed],
    bias: torch.Tensor | None,
    scratch: Scratch,
    config: Config | None = None,
    planes: torch.Tensor | None = None,
) -> torch.Tensor:
    """The products of x with up to three packed weights, side by side.

    x: bf16 or fp16 [M, K], contiguous, M from 1 to 16; ``bias``: [N of all], as x. Returns
    [M, N of all], as x. ValueError for other operands. Queued on the current stream.
    """
    tokens, columns = _check(x, weights, bias)
    rows = [weight.shape[0] for weight in weights]
    total = sum(rows)
    config = config or choose(tokens, rows, columns, x.device)
    y = torch.empty((tokens, total), dtype=x.dtype, device=x.device)
    planes = spread(x) if planes is None else planes
    padded = 1 if tokens == 1 else MAX_TOKENS
    if config.split > 1:
        scratch.hold(config.split * padded * total, total // config.rows)
    base = weights[0].codes.data_ptr()
    unit = 4 if tokens == 1 else 1
    codes = [(weight.codes.data_ptr() - base) // unit for weight in weights]
    scale_base = weights[0].scales.data_ptr()
    scales = [(weight.scales.data_ptr() - scale_base) // 2 for weight in weights]
    codes += codes[-1:] * (MAX_WEIGHTS - len(codes))
    scales += scales[-1:] * (MAX_WEIGHTS - len(scales))
    rows += [total] * (MAX_WEIGHTS - len(rows))
    run = BLOCK if columns % BLOCK == 0 else RUN
    grid = (total // config.rows, config.split)
    constants: dict[str, Any] = {
        "ROWS": config.rows, "SPLIT": config.split, "BIAS": bias is not None, "RUN": run,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    operands = (
        weights[0].scales, bias if bias is not None else y, y, scratch.parts, scratch.counters,
        *codes, *scales, rows[0], rows[1], total, columns,
    )  # fmt: skip
    if tokens == 1:
        words = weights[0].codes.view(torch.int32)
        _one_token_kernel[grid](planes, words, *operands, RUNS=config.runs, **constants)
    else:
        pairs = weights[0].codes.view(torch.int8)
        asm = not interpreted()
        _tokens_kernel[grid](
            planes, pairs, *operands, tokens, TOKENS=MAX_TOKENS, ASM=asm, **constants
        )
    return y


def choose(tokens: int, rows: list[int], columns: int, device: torch.device) -> Config:
    """How to cut a product."""
    most = 16 if tokens == 1 else 64
    size = most
    while any(count % size for count in rows):
        size //= 2
    return Config(rows=size, runs=4, split=1, warps=4, stages=4)


def _check(x: torch.Tensor, weights: list[Packed], bias: torch.Tensor | None) -> tuple[int, int]:
    if x.dim() != 2 or not 1 <= x.shape[0] <= MAX_TOKENS or not x.is_contiguous():
        raise ValueError(
            f"x is {tuple(x.shape)}: expected [M, K], contiguous, M up to {MAX_TOKENS}"
        )
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}: expected bfloat16 or float16")
    if not 1 <= len(weights) <= MAX_WEIGHTS:
        raise ValueError(f"{len(weights)} weights: expected 1 to {MAX_WEIGHTS}")
    tokens, columns = x.shape
    for weight in weights:
        elements = weight.shape[0] * weight.shape[1]
        found = (
            weight.codes.dtype,
            weight.codes.numel(),
            weight.scales.dtype,
            weight.scales.numel(),
        )
        expected = (torch.uint8, code_bytes(elements), torch.bfloat16, scale_count(elements))
        if found != expected or weight.shape[1] != columns or columns % RUN:
            raise ValueError(
                f"a weight of {weight.shape} is {found}: expected {expected}, and {columns} columns,"
                f" a multiple of {RUN}"
            )
        if weight.codes.data_ptr() % 16 or weight.codes.device != x.device:
            raise ValueError("codes must be 16-byte aligned and on the device of x")
    total = sum(weight.shape[0] for weight in weights)
    if bias is not None and (bias.shape != (total,) or bias.dtype != x.dtype):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}: expected {x.dtype} [{total}]")
    return tokens, columns
