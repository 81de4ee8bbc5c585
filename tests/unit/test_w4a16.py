"""The kernels that read packed weights, in Triton's interpreter, against float64 and plain torch.

Outputs are fp32 or fp16: the interpreter cuts fp32 to bf16 where a GPU rounds. Speed, and what programs
that really run at once do to each other, is for tests/gpu.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from common.dequantize import interpreted
from engine.one_token import (
    GLU,
    PLAIN,
    RESIDUAL,
    attention_kernel,
    begin_kernel,
    combine_kernel,
    glu_kernel,
)
from engine.packed_weight import Packed
from engine.w4a16 import (
    Epilogue,
    RingCut,
    Scratch,
    TokensCut,
    multiply,
    multiply_one,
    multiply_tokens,
    spread,
)
from tests.packed import pack_side_by_side

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LONG = 4864
COLUMNS = (64, 128, 192, 320, LONG)
SPLITS = (1, 2, 3, 8)  # some are more than there are runs in a row
SIDE_BY_SIDE = ([32], [16, 32], [32, 16, 16])  # rows of the weights that share x
TOKENS = (2, 7, 16)
CLOSE = 1e-5  # of the largest value
EPS = 1e-6


def close(found: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    """``found`` in fp32 is ``expected``, in float64, but for the order of sums."""
    assert found.shape == expected.shape and found.dtype == torch.float32
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < CLOSE, f"{what}: off by {float(error):.2g} of the largest value"


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cases() -> Iterator[tuple[int, list[int], int]]:
    """Columns, rows of each weight, and parts of K."""
    rows = cycle(SIDE_BY_SIDE)
    for columns in COLUMNS:
        for split in SPLITS if columns < LONG else SPLITS[1:3]:
            yield columns, next(rows), split


def ring() -> int:
    """One token's products, up to three weights side by side. On the CPU there are 4 times as many programs
    as the cut says: with 4 there are 1 to 4 slices, and with 4000 as many as tiles."""
    checked = 0
    rows_of = cycle(SIDE_BY_SIDE)
    for columns, rows in (*((some, next(rows_of)) for some in COLUMNS), (2240, [160, 32, 16])):
        weights, dense = pack_side_by_side(rows, columns, "cpu", seed=columns + 1)
        x = normal(1, columns, seed=15).bfloat16()
        bias = normal(sum(rows), seed=16).bfloat16() if len(rows) != 2 else None
        expected = (x.double() @ dense.double().T)[0]
        if bias is not None:
            expected += bias.double()
        scratch, planes, found = Scratch(CPU), spread(x), []
        for programs in (1, 3, 1000):
            y = torch.full((sum(rows),), torch.nan)
            multiply_one(planes, weights, bias, y, scratch, cut=RingCut(3, programs))
            assert not scratch.counters.any()  # ready for the next product
            found.append(y)
        close(found[0], expected, ("ring", columns, rows))
        alone = []
        parts = [None] * len(rows) if bias is None else bias.split(rows)
        for weight, part in zip(weights, parts, strict=True):
            y = torch.full((weight.shape[0],), torch.nan)
            multiply_one(planes, [weight], part, y, scratch, cut=RingCut(2, 2))
            alone.append(y)
        # Neither how many programs there were shows, nor what was multiplied together.
        for other in (*found[1:], torch.cat(alone)):
            assert torch.equal(other, found[0]), (columns, rows)
        checked += 1
    return checked


def several_tokens() -> int:
    """The same for two to sixteen tokens. The interpreter makes NaN of a code as bf16: so x is fp16."""
    checked = 0
    tokens = cycle(TOKENS[:2])
    for columns, rows, split in cases():
        for count in (next(tokens), TOKENS[-1]) if columns < LONG else (next(tokens),):
            weights, dense = pack_side_by_side(rows, columns, "cpu", seed=columns)
            x = normal(count, columns, seed=3).half()
            bias = normal(sum(rows), seed=4).half() if len(rows) != 2 else None
            expected = x.double() @ dense.double().T
            if bias is not None:
                expected += bias.double()
            scratch = Scratch(CPU)
            y = torch.full((count, sum(rows)), torch.nan)
            cut = TokensCut(16, split, True, 4, 3)
            multiply_tokens(spread(x), count, weights, bias, y, scratch, cut=cut)
            close(y, expected, ("several tokens", columns, rows, count, split))
            assert not scratch.counters.any()
            checked += 1
    return checked


def chosen_cuts() -> int:
    """`multiply` with the cuts that it chooses itself; and what it refuses."""
    checked = 0
    scratch = Scratch(CPU)
    for columns in (320, LONG):
        weights, dense = pack_side_by_side([64, 32, 32], columns, "cpu", seed=columns)
        for tokens in (1, *TOKENS) if columns < LONG else (1, 7):
            x = normal(tokens, columns, seed=5).half()
            bias = normal(128, seed=6).half()
            found = multiply(x, weights, bias, scratch)
            expected = x.double() @ dense.double().T + bias.double()
            assert found.dtype == torch.float16 and found.shape == (tokens, 128)
            bound = expected.abs() * 2.0**-11 + CLOSE * expected.abs().max()  # rounded once
            assert ((found.double() - expected).abs() <= bound).all(), (columns, tokens)
            checked += 1
    x = normal(2, LONG, seed=7).half()
    wrong = [
        (x.float(), weights, None),
        (x[:, :64], weights, None),
        (x.repeat(9, 1), weights, None),
        (x, weights * 2, None),
        (x, weights, bias[:-1]),
        (x, [Packed(weights[0].codes[1:], weights[0].scales, weights[0].shape)], None),
    ]
    for operands in wrong:
        try:
            multiply(*operands, scratch)
        except ValueError as error:
            assert "expected" in str(error) or "must be" in str(error)
        else:
            raise AssertionError(f"operands are taken: {operands[0].shape}")
        checked += 1
    return checked


def epilogues() -> int:
    """What follows a product of one token in the same launch."""
    checked = 0
    for columns, rows in ((192, 64), (320, 48), (64, 128), (2240, 48)):
        check_epilogues(columns, rows, RingCut(per_processor=1))
        checked += 3

    x, norm, up = normal(192, seed=12), normal(192, seed=13).bfloat16(), normal(192, seed=14)
    hidden, planes, sums = torch.empty(192), torch.full((9, 24), torch.nan), torch.empty(3)
    begin_kernel[(3,)](x, norm, hidden, planes, sums, 192, SIZE=64, num_warps=1)
    assert torch.equal(hidden, x)
    close(sums, x.double().square().view(3, 64).sum(1), "sums")
    same_planes(planes, x.double() * norm.double(), "begin")
    planes.fill_(torch.nan)
    glu_kernel[(3,)](x, up, planes, 192, SIZE=64, num_warps=1)
    same_planes(planes, silu(x.double()) * up.double(), "gated apart")
    return checked + 2


def check_epilogues(columns: int, rows: int, cut: RingCut) -> None:
    """Each of them with two weights of so many columns and rows, or one."""
    weights, dense = pack_side_by_side([rows, rows], columns, "cpu", seed=rows)
    first, second = dense.double().split(rows)
    x = normal(columns, seed=8)
    sums = x.square().view(-1, 16).sum(1)
    factor = torch.rsqrt(x.double().square().mean() + EPS)
    scratch = Scratch(CPU)

    y, bias = torch.full((2 * rows,), torch.nan), normal(2 * rows, seed=9).bfloat16()
    normed = Epilogue(int(PLAIN), sums, EPS)
    multiply_one(spread(x[None]), weights, bias, y, scratch, normed, cut)
    expected = dense.double() @ (x.double() * factor) + bias.double()
    close(y, expected, ("norm", columns, cut))

    planes = torch.full((9, rows // 8), torch.nan)
    gated = Epilogue(int(GLU), sums, EPS, planes=planes)
    multiply_one(spread(x[None]), weights, None, None, scratch, gated, cut)
    a, b = first @ (x.double() * factor), second @ (x.double() * factor)
    same_planes(planes, silu(a) * b, ("gated", columns, cut))

    hidden, norm = normal(rows, seed=10), normal(rows, seed=11).bfloat16()
    expected = hidden.double() + first @ x.double()
    planes, next_sums = torch.full((9, rows // 8), torch.nan), torch.full((rows,), torch.nan)
    added = Epilogue(int(RESIDUAL), hidden=hidden, norm=norm, planes=planes, next_sums=next_sums)
    count = multiply_one(spread(x[None]), weights[:1], None, None, scratch, added, cut)
    close(hidden, expected, ("residual", columns, cut))
    same_planes(planes, expected * norm.double(), ("residual", columns, cut))
    assert next_sums[count:].isnan().all()
    close(next_sums[:count].sum()[None], expected.square().sum()[None], "squares")
    assert not scratch.counters.any()


def same_planes(planes: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    """``planes`` are those of the vector ``expected``, in float64."""
    close(planes, spread(expected.float()[None]).double(), what)


DIM, CAPACITY, TILE = 32, 128, 16
ANGLES = torch.outer(torch.arange(CAPACITY), 100.0 ** (-torch.arange(DIM // 2) / (DIM // 2)))


def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
    """x [heads, DIM] as complex numbers, turned by the position's angles; float64."""
    pairs = torch.complex(*x.double().chunk(2, -1))
    turned = pairs * torch.polar(torch.ones(DIM // 2).double(), ANGLES[position].double())
    return torch.cat([turned.real, turned.imag], -1)


def attention() -> int:
    """One token's attention over a cache, its queries and keys rotated, against torch's own."""
    checked = 0
    for heads, kv in ((6, 2), (4, 4), (5, 1)):
        for tiles, chunks in ((1, 8), (4, 2)):
            for here in (0, 15, 16, 31, 100, CAPACITY - 1):
                check_attention(heads, kv, tiles, chunks, here, head_norms=here % 2 == 1)
                checked += 1
    return checked


def check_attention(
    heads: int, kv: int, tiles: int, chunks: int, here: int, head_norms: bool
) -> None:
    """With so many heads and the past cut so, for the token at position ``here``."""
    past = normal(2, kv, CAPACITY, DIM, seed=here)
    past[:, :, here:] = torch.nan  # not there yet
    keys, values = past[0].clone(), past[1].clone()
    qkv = normal(heads + 2 * kv, DIM, seed=here + 1)
    tables = ANGLES.cos().repeat(1, 2), ANGLES.sin().repeat(1, 2)
    partial = torch.full((kv, chunks, 16, DIM), torch.nan)
    peaks = torch.full((2, kv, 16, chunks), torch.nan)
    planes = torch.full((9, heads * DIM // 8), torch.nan)
    position = torch.tensor([here], dtype=torch.int32)
    shape = {
        "HEADS": heads, "GROUP": heads // kv, "PADDED": 16, "DIM": DIM, "CHUNKS": chunks, "KV": kv,
        "PDL": False,
    }  # fmt: skip
    norms = normal(2, DIM, seed=here + 2)
    attention_kernel[(kv, chunks)](
        qkv, *norms, EPS, *tables, keys, values, position, partial, peaks, CAPACITY, DIM**-0.5,
        TILE=TILE, TILES=tiles, HEAD_NORM=head_norms, **shape,
    )  # fmt: skip
    combine_kernel[(heads,)](partial, peaks, position, planes, CHUNK=TILE * tiles, **shape)

    q, k, v = qkv.split([heads, kv, kv])
    if head_norms:
        q, k = (
            rms_norm(x.double(), [DIM], y.double(), EPS) for x, y in zip((q, k), norms, strict=True)
        )
    k = rotated(k, here)
    all_keys = torch.cat([past[0, :, :here].double(), k[:, None]], 1)
    all_values = torch.cat([past[1, :, :here], v[:, None]], 1).double()
    expected = scaled_dot_product_attention(
        rotated(q, here)[:, None], all_keys.repeat_interleave(heads // kv, 0),
        all_values.repeat_interleave(heads // kv, 0),
    )  # fmt: skip
    same_planes(planes, expected.flatten(), ("attention", heads, kv, tiles, here))
    close(keys[:, here], k, "the key that is kept")
    assert torch.equal(values[:, here], v)
    for kept, before in ((keys, past[0]), (values, past[1])):
        assert torch.equal(kept[:, :here], before[:, :here])
        assert kept[:, here + 1 :].isnan().all()


PARTS = {
    "ring": (ring, 6),
    "several_tokens": (several_tokens, 4 * 4 * 2 + 2),
    "chosen_cuts": (chosen_cuts, 4 + 2 + 6),
    "epilogues": (epilogues, 4 * 3 + 2),
    "attention": (attention, 3 * 2 * 6),
}


@pytest.mark.parametrize("part", PARTS)
def test_in_the_interpreter(part: str) -> None:
    """In a process of its own: the interpreter is chosen when a kernel is defined."""
    assert not interpreted()
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.test_w4a16", part],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{PARTS[part][1]} checked\n"


if __name__ == "__main__":
    assert interpreted()
    print(f"{PARTS[sys.argv[1]][0]()} checked")
