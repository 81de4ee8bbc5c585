"""Attention of single tokens of many sequences in one launch, each over its own KV cache, where it lies.

As flash-decoding (Dao et al., 2023) cuts one past into chunks, all pasts are cut here. The chunks of a
sequence are the same in every company, and so is the order of its sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from engine.one_token import WIDE_HEADS, attention_warps

TILE, TILES = 64, 4  # tokens at once; tiles of a chunk
CHUNK = TILE * TILES
ALIGNED = 8  # elements: 16 bytes
WIDTHS = 16  # a table has room for a multiple of so many sequences


@triton.jit(do_not_specialize=["chunks"])
def _chunks_kernel(  # type: ignore[no-untyped-def]
    query, key, value, memory, places, rows, lengths, partial, peaks,
    query_head, query_row, key_head, key_row, value_head, value_row, width, chunks, scale,
    GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, KV: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program: the query heads of one key/value head of one sequence over one chunk of its past. The
    chunk to which the new token belongs writes its key and value to the cache.

    operand  shape                           dtype        layout
    query    [KV GROUP, any, DIM]            bf16, fp16   by head and row, DIM contiguous
    key      [KV, any, DIM]                  bf16, fp16   likewise; value likewise
    memory   any                             bf16, fp16   what ``places`` count from
    places   [3, width]                      int64        keys; values; from one head to the next: elements
    rows     [width]                         int32        of the sequence's new token
    lengths  [width]                         int32        of its past
    partial  [sequences, KV, chunks, GROUP, DIM]  fp32    out: of each chunk, not yet divided
    peaks    [2, sequences, KV, chunks, GROUP]    fp32    out: the largest score; the sum of weights
    """
    one, head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.num_programs(0)
    here = tl.load(lengths + one)
    start = chunk * TILE * TILES
    if start <= here:
        dim, lane = tl.arange(0, DIM), tl.arange(0, PADDED)
        row = tl.load(rows + one).to(tl.int64)
        apart = tl.multiple_of(tl.load(places + 2 * width + one), ALIGNED) * head
        keys = memory + tl.multiple_of(tl.load(places + one), ALIGNED) + apart
        values = memory + tl.multiple_of(tl.load(places + width + one), ALIGNED) + apart
        real = (lane < GROUP)[:, None]
        q_at = query + row * query_row + ((head * GROUP + lane) * query_head)[:, None]
        q = tl.load(q_at + dim[None, :], mask=real, other=0.0)
        k = tl.load(key + row * key_row + head * key_head + dim)
        v = tl.load(value + row * value_row + head * value_head + dim)
        if here < start + TILE * TILES:
            tl.store(keys + here * DIM + dim, k)
            tl.store(values + here * DIM + dim, v)
        most = tl.full((PADDED,), float("-inf"), tl.float32)
        total = tl.zeros((PADDED,), tl.float32)
        out = tl.zeros((PADDED, DIM), tl.float32)
        token = start + tl.arange(0, TILE)
        for _ in range(min(TILES, (here - start) // TILE + 1)):
            at = token[:, None] * DIM + dim[None, :]
            there = (token < here)[:, None]
            new = (token == here)[:, None]  # is not read from the cache: it is written just now
            tile = tl.where(new, k[None, :], tl.load(keys + at, mask=there, other=0.0))
            scores = tl.dot(q, tl.trans(tile)) * scale
            scores = tl.where((token <= here)[None, :], scores, float("-inf"))
            largest = tl.maximum(most, tl.max(scores, 1))
            weight = tl.exp(scores - largest[:, None])
            fade = tl.exp(most - largest)
            total = total * fade + tl.sum(weight, 1)
            tile = tl.where(new, v[None, :], tl.load(values + at, mask=there, other=0.0))
            out = out * fade[:, None] + tl.dot(weight.to(tile.dtype), tile)
            most = largest
            token += TILE
        to = ((one * KV + head) * chunks + chunk) * GROUP + lane
        tl.store(partial + to[:, None] * DIM + dim[None, :], out, mask=real)
        tl.store(peaks + to, most, mask=lane < GROUP)
        tl.store(peaks + count * KV * chunks * GROUP + to, total, mask=lane < GROUP)


@triton.jit(do_not_specialize=["chunks"])
def _join_kernel(  # type: ignore[no-untyped-def]
    partial, peaks, rows, lengths, output, chunks,
    GROUP: tl.constexpr, DIM: tl.constexpr, KV: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program puts the chunks of one query head of one sequence together. output: [any, KV GROUP,
    DIM], contiguous; the others as above."""
    one, query = tl.program_id(0), tl.program_id(1)
    head, lane = query // GROUP, query % GROUP
    dim = tl.arange(0, DIM)
    sums = peaks + tl.num_programs(0) * KV * chunks * GROUP
    first = (one * KV + head) * chunks * GROUP + lane
    most = tl.load(peaks + first)
    total = tl.load(sums + first)
    out = tl.load(partial + first * DIM + dim)
    for chunk in range(1, tl.load(lengths + one) // CHUNK + 1):
        at = first + chunk * GROUP
        peak = tl.load(peaks + at)
        largest = tl.maximum(most, peak)
        fade, weight = tl.exp(most - largest), tl.exp(peak - largest)
        total = total * fade + tl.load(sums + at) * weight
        out = out * fade + tl.load(partial + at * DIM + dim) * weight
        most = largest
    row = tl.load(rows + one).to(tl.int64)
    to = output + (row * KV * GROUP + query) * DIM + dim
    tl.store(to, (out / total).to(output.dtype.element_ty))


def launch_options(dim: int) -> dict[str, int]:
    """Of a program of attention, by the elements of a head: of wide ones nothing is loaded ahead, since
    devices have not the memory for that."""
    return {"num_warps": attention_warps(dim)} | ({"num_stages": 1} if dim > WIDE_HEADS else {})


class ManyPasts:
    """The caches of some sequences, for one pass in which each has one token.

    ``pasts``: of each sequence, of each layer, keys and values: [1, KV heads, capacity, DIM], contiguous,
    with room for one more than its ``lengths``. ``rows``: where in the pass its token is.
    """

    def __init__(
        self,
        pasts: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]],
        lengths: Sequence[int],
        rows: Sequence[int],
        heads: int,
    ) -> None:
        self._memory = memory = pasts[0][0][0]
        _, self._kv, _, self._dim = memory.shape
        self._group = heads // self._kv
        base, size = memory.data_ptr(), memory.element_size()
        self._count = len(lengths)
        # Of each table every row begins at an aligned address, or kernels would be compiled again.
        self._width = -(-self._count // WIDTHS) * WIDTHS
        unused = [0] * (self._width - self._count)
        places = [
            [
                [(keys.data_ptr() - base) // size for keys, _ in layer] + unused,
                [(values.data_ptr() - base) // size for _, values in layer] + unused,
                [keys.stride(1) for keys, _ in layer] + unused,
            ]
            for layer in zip(*pasts, strict=True)
        ]
        both = [[*rows, *unused], [*lengths, *unused]]
        device = memory.device
        self._places = torch.tensor(places, dtype=torch.int64, device=device)
        self._both = torch.tensor(both, dtype=torch.int32, device=device)
        self._chunks = max(lengths) // CHUNK + 1
        shape = (self._count, self._kv, self._chunks, self._group)
        self._partial = torch.empty((*shape, self._dim), dtype=torch.float32, device=device)
        self._peaks = torch.empty((2, *shape), dtype=torch.float32, device=device)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        output: torch.Tensor,
    ) -> None:
        """query [1, heads, rows, DIM], key and value [1, KV heads, rows, DIM], DIM contiguous; results go
        to ``output`` [1, rows, heads, DIM], contiguous, keys and values to the caches."""
        rows, lengths = self._both
        count, kv, dim, group = self._count, self._kv, self._dim, self._group
        _chunks_kernel[(count, kv, self._chunks)](
            query, key, value, self._memory, self._places[layer], rows, lengths,
            self._partial, self._peaks, *query.stride()[1:3], *key.stride()[1:3],
            *value.stride()[1:3], self._width, self._chunks, scale,
            GROUP=group, PADDED=max(16, triton.next_power_of_2(group)), DIM=dim, KV=kv,
            TILE=TILE, TILES=TILES, ALIGNED=ALIGNED, **launch_options(dim),
        )  # fmt: skip
        _join_kernel[(count, kv * group)](
            self._partial, self._peaks, rows, lengths, output, self._chunks,
            GROUP=group, DIM=dim, KV=kv, CHUNK=CHUNK, num_warps=1,
        )  # fmt: skip
