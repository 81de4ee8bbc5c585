"""Products of a few tokens with packed weights: one launch for up to three weights that share x.

y = x @ W.T + b, where W [N, K] is INT4 in blocks of 128 with bf16 scales, read once, as it is packed;
codes become floats in registers, products are accumulated in fp32 and scaled there, and rounded once.
One token takes the kernel of `engine.ring`. Two to sixteen take tensor cores, the even and the odd
elements apart, so that no code has to change its lane. Knows no slots and no sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from common.blocks import BLOCK, code_bytes, scale_count
from common.dequantize import interpreted
from common.formats import RUN, packable
from common.repeated import Repeated
from engine import one_token
from engine.packed import MAX_FUSED_TOKENS as MAX_TOKENS
from engine.packed_weight import Packed
from engine.ring import TILE, UNIT, ring_kernel

MAX_WEIGHTS = 3
SUMS_A_WARP = 2048  # at the end of a slice: 64 registers of a thread
RING_BYTES = 2 * TILE * UNIT // 2  # of codes, for each stage that holds some
SHARED_BYTES = 1280  # of shared memory that a program takes besides


@dataclass(frozen=True)
class RingCut:
    """How the product of one token is shared among programs that stay: ``stages`` of the ring, of which all
    but one hold codes; programs on a multiprocessor at most, and registers of a thread; ``early``: the
    kernel after may begin when all programs have begun. The fastest by far that was tried on an H100."""

    stages: int = 3
    per_processor: int = 12
    registers: int = 80
    warps: int = 2
    early: bool = True


@dataclass(frozen=True)
class TokensCut:
    """How the product of several tokens is cut: rows of a program; ``split``: each of the ``parts`` of K
    has a program of its own, or one program takes all."""

    rows: int
    parts: int
    split: bool
    warps: int
    stages: int


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    acc, columns, rows, mask, bias, y, parts, counters, pid, part, total,
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
            _write(acc, rows, at, mask, bias, y, BIAS)
    else:
        _write(acc, rows, at, mask, bias, y, BIAS)


@triton.jit
def _write(acc, rows, at, mask, bias, y, BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    if BIAS:
        acc += tl.load(bias + rows).to(tl.float32)[:, None]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=mask)


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
        even = (wide >> 4).to(tl.float32).to(dtype)
        odd = ((wide << 28) >> 28).to(tl.float32).to(dtype)
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
    TOKENS: tl.constexpr, ASM: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program multiplies ROWS rows with its part of K for all tokens, a run at a time. What is summed
    in which order depends on K alone: K has PARTS parts, SPLIT is 1 or PARTS.

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
    row, local, code, scale = one_token.place(
        pid, rows0, rows1, code0, code1, code2, scale0, scale1, scale2, ROWS
    )
    runs = K // RUN
    per_part = tl.cdiv(runs, PARTS)
    rows = tl.arange(0, ROWS)
    half = tl.arange(0, HALF)
    token = tl.arange(0, TOKENS)
    total_acc = tl.zeros((ROWS, TOKENS), tl.float32)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    at = pairs + code + ((local + rows) * (K // 2))[:, None] + half[None, :]
    first_run = (local + rows) * runs
    x_at = planes + token[None, :] * (K // 2) + half[:, None]
    first, last = 0, runs
    if SPLIT > 1:
        first, last = part * per_part, min((part + 1) * per_part, runs)
    factor = tl.load(scales + scale + ((first_run + tl.minimum(first, runs - 1)) * RUN) // 128)
    if PDL:
        gdc_wait()  # from here on what the kernel before has written is read, or overwritten
        gdc_launch_dependents()
    for run in range(first, last):
        data = tl.load(at + run * HALF)
        # The next run's, so that nobody waits for it.
        ahead = tl.minimum(run + 1, runs - 1)
        next_factor = tl.load(scales + scale + ((first_run + ahead) * RUN) // 128)
        x_even = tl.load(x_at + run * HALF)
        x_odd = tl.load(x_at + TOKENS * (K // 2) + run * HALF)
        even, odd = _unpack(data, ASM, x_even.dtype)
        if not ASM:  # neither the interpreter nor an old device multiplies bf16
            even, odd = even.to(tl.float32), odd.to(tl.float32)
            x_even, x_odd = x_even.to(tl.float32), x_odd.to(tl.float32)
        product = tl.dot(even, x_even)
        product = tl.dot(odd, x_odd, product)
        acc += product * factor.to(tl.float32)[:, None]
        factor = next_factor
        if SPLIT == 1 and PARTS > 1:
            ends = (run + 1) % per_part == 0
            total_acc += tl.where(ends, acc, 0.0)
            acc = tl.where(ends, 0.0, acc)
    acc += total_acc
    mask = (rows >= 0)[:, None] & (token < tokens)[None, :]
    _finish(
        acc, token, row + rows, mask, bias, y, parts, counters, pid, part, total,
        SPLIT, BIAS, TOKENS,
    )  # fmt: skip


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


@dataclass(frozen=True)
class Epilogue:
    """What a product of one token is followed by; see `ring.ring_kernel`.

    ``sums``: fp32, if x is to be normalized: parts of the sum of its squares. RESIDUAL: ``hidden``,
    ``norm``, ``planes`` (the next x, spread) and ``next_sums``, one number a tile. GLU: ``planes``.
    """

    mode: int = 0
    sums: torch.Tensor | None = None
    eps: float = 0.0
    hidden: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    planes: torch.Tensor | None = None
    next_sums: torch.Tensor | None = None
    pdl: bool = False


NONE = Epilogue()
RING = RingCut()


def spread(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] in the order in which the kernels read it; one more launch."""
    tokens, columns = x.shape
    if tokens == 1:
        words = columns // 8
        planes = torch.empty((9, words), dtype=torch.float32, device=x.device)
        grid = (triton.cdiv(columns, 1024),)
        one_token.spread_kernel[grid](x, planes, words, SIZE=1024, num_warps=4)
        return planes
    planes = torch.empty((2, MAX_TOKENS, columns // 2), dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(columns // 2, 512)
    _spread_kernel[(blocks, MAX_TOKENS)](
        x, planes, columns, tokens, SIZE=512, TOKENS=MAX_TOKENS, num_warps=2
    )
    return planes


def multiply(
    x: torch.Tensor, weights: list[Packed], bias: torch.Tensor | None, scratch: Scratch
) -> torch.Tensor:
    """The products of x with up to three packed weights, side by side.

    x: bf16 or fp16 [M, K], contiguous, M from 1 to 16; ``bias``: [N of all], as x. Returns
    [M, N of all], as x. ValueError for other operands. Queued on the current stream.
    """
    tokens = _check(x, weights, bias)
    total = sum(weight.shape[0] for weight in weights)
    y = torch.empty((tokens, total), dtype=x.dtype, device=x.device)
    planes = spread(x)
    if tokens == 1:
        multiply_one(planes, weights, bias, y, scratch)
    else:
        multiply_tokens(planes, tokens, weights, bias, y, scratch)
    return y


class One(NamedTuple):
    """What one token brings to a product: ``planes``, fp32 [9, K / 8], see `spread`; ``y``: any floating
    dtype, N of all elements, for PLAIN."""

    planes: torch.Tensor
    y: torch.Tensor | None
    epilogue: Epilogue = NONE


def multiply_one(
    planes: torch.Tensor,
    weights: list[Packed],
    bias: torch.Tensor | None,
    y: torch.Tensor | None,
    scratch: Scratch,
    epilogue: Epilogue = NONE,
    cut: RingCut = RING,
) -> int:
    """One token's products; see `One`. Returns how many sums RESIDUAL wrote."""
    return multiply_each([One(planes, y, epilogue)], weights, bias, scratch, cut)


def multiply_each(
    ones: Sequence[One],
    weights: list[Packed],
    bias: torch.Tensor | None,
    scratch: Scratch,
    cut: RingCut = RING,
) -> int:
    """The products of tokens whose epilogues differ in their tensors alone, a launch each: to the bit what
    `multiply_one` gives. Returns how many sums RESIDUAL wrote for each.

    The launches share ``scratch``. With PDL one may begin while those before it still run; until it has
    waited for them it reads nothing but codes and scales, and it writes after that, as where products of
    different weights follow one another.
    """
    rows, columns, total, run, places = _places(weights, 4)
    first = ones[0].epilogue
    glu = first.mode == int(one_token.GLU)
    tiles = rows[0] // TILE if glu else total // (2 * TILE)
    parts = ring_parts(columns)
    slices = max(1, min(_programs(ones[0].planes.device, cut) // parts, tiles))
    scratch.hold(parts * total, slices)
    at_once = SUMS_A_WARP * cut.warps // (2 * parts if glu else parts)
    sum_count = 0 if first.sums is None else first.sums.numel()
    codes, scales = weights[0].codes.view(torch.int32), weights[0].scales
    options = {
        "K": columns, "TILE": TILE, "RUNS": UNIT // run, "PARTS": parts, "STAGES": cut.stages,
        "BIAS": bias is not None, "RUN": run, "MODE": first.mode, "NORM": first.sums is not None,
        "SUMS": 1 if first.sums is None else triton.next_power_of_2(sum_count),
        "AT_ONCE": min(128, max(2 * TILE, triton.next_power_of_2(at_once + 1) // 2)),
        "PDL": first.pdl, "EARLY": cut.early, "ASM": not interpreted(),
        "num_warps": cut.warps, "maxnreg": cut.registers, "launch_pdl": first.pdl,
    }  # fmt: skip
    launch = Repeated(ring_kernel, (slices * parts,), **options)
    for planes, y, epilogue in ones:
        unused = scratch.parts if y is None else y
        launch(
            planes, codes, scales, bias if bias is not None else unused, unused, scratch.parts,
            scratch.counters, *places, rows[0] if glu else total, tiles,
            epilogue.sums, sum_count, epilogue.eps, epilogue.hidden, epilogue.norm,
            epilogue.planes, epilogue.next_sums,
        )  # fmt: skip
    return tiles


def ring_parts(columns: int) -> int:
    """How many sums of a row need scratch memory."""
    return int(triton.cdiv(columns, UNIT))


@cache
def _programs(device: torch.device, cut: RingCut) -> int:
    """How many programs a device can have at once, or the cut wants."""
    if device.type != "cuda":
        return 4 * cut.per_processor  # of the interpreter, which has no multiprocessors
    found = torch.cuda.get_device_properties(device)
    each = (cut.stages - 1) * RING_BYTES + SHARED_BYTES
    fit = max(1, found.shared_memory_per_multiprocessor // each)
    return int(found.multi_processor_count * min(cut.per_processor, fit))


@cache
def dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may begin on a device before the one before it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@cache
def _assembled(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has the instructions of `_unpack`: arithmetic of bf16 came with 8.0."""
    if interpreted():
        return False
    return dtype != torch.bfloat16 or torch.cuda.get_device_capability(device)[0] >= 8


def multiply_tokens(
    planes: torch.Tensor,
    tokens: int,
    weights: list[Packed],
    bias: torch.Tensor | None,
    y: torch.Tensor,
    scratch: Scratch,
    cut: TokensCut | None = None,
) -> None:
    """Several tokens' products into y [tokens, N of all]. planes: see `spread`."""
    from engine.cuts import tokens_cut

    rows, columns, total, run, places = _places(weights, 1)
    cut = cut or tokens_cut(tuple(rows), columns)
    split = cut.parts if cut.split else 1
    if split > 1:
        scratch.hold(split * MAX_TOKENS * total, total // cut.rows)
    _tokens_kernel[(total // cut.rows, split)](
        planes, weights[0].codes.view(torch.int8), weights[0].scales,
        bias if bias is not None else y, y, scratch.parts, scratch.counters,
        *places, total, columns, tokens,
        ROWS=cut.rows, SPLIT=split, BIAS=bias is not None, RUN=run, TOKENS=MAX_TOKENS,
        ASM=_assembled(planes.device, planes.dtype), PARTS=cut.parts,
        PDL=dependent_launch(planes.device),
        num_warps=cut.warps, num_stages=cut.stages, launch_pdl=dependent_launch(planes.device),
    )  # fmt: skip


def _places(weights: list[Packed], unit: int) -> tuple[list[int], int, int, int, list[int]]:
    """Rows of each weight, columns, rows of all, the run; and where the codes (in units of so many
    bytes) and the scales of three weights are, from those of the first, and two row counts."""
    rows = [weight.shape[0] for weight in weights]
    columns = weights[0].shape[1]
    base, scale_base = weights[0].codes.data_ptr(), weights[0].scales.data_ptr()
    codes = [(weight.codes.data_ptr() - base) // unit for weight in weights]
    scales = [(weight.scales.data_ptr() - scale_base) // 2 for weight in weights]
    lacking = MAX_WEIGHTS - len(weights)
    total = sum(rows)
    counts = [*rows, *[total] * lacking][:2]
    places = [*codes, *codes[-1:] * lacking, *scales, *scales[-1:] * lacking, *counts]
    return rows, columns, total, BLOCK if columns % BLOCK == 0 else RUN, places


def _check(x: torch.Tensor, weights: list[Packed], bias: torch.Tensor | None) -> int:
    if x.dim() != 2 or not 1 <= x.shape[0] <= MAX_TOKENS or not x.is_contiguous():
        raise ValueError(
            f"x is {tuple(x.shape)}: expected [M, K], contiguous, M up to {MAX_TOKENS}"
        )
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}: expected bfloat16 or float16")
    if not 1 <= len(weights) <= MAX_WEIGHTS:
        raise ValueError(f"{len(weights)} weights: expected 1 to {MAX_WEIGHTS}")
    for weight in weights:
        _check_weight(x, weight)
    total = sum(weight.shape[0] for weight in weights)
    if bias is not None and (bias.shape != (total,) or bias.dtype != x.dtype):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}: expected {x.dtype} [{total}]")
    return x.shape[0]


def _check_weight(x: torch.Tensor, weight: Packed) -> None:
    elements, columns = weight.shape[0] * weight.shape[1], x.shape[1]
    found = (weight.codes.dtype, weight.codes.numel(), weight.scales.dtype, weight.scales.numel())
    expected = (torch.uint8, code_bytes(elements), torch.bfloat16, scale_count(elements))
    if found != expected or weight.shape[1] != columns or not packable(weight.shape):
        raise ValueError(
            f"a weight of {weight.shape} is {found}: expected {expected}, {columns} columns, a"
            f" multiple of {RUN}, and rows in sixteens"
        )
    if weight.codes.data_ptr() % 16 or weight.codes.device != x.device:
        raise ValueError("codes must be 16-byte aligned and on the device of x")
