"""The fused W4A16 kernels: every shape of a model, one to sixteen tokens, and what else there is.

python -m bench.kernels tune [--output FILE]     the fastest cut of each product, by trying all
python -m bench.kernels table [--output FILE]    time and share of memory bandwidth, tinygemm and cuBLAS

--products "k,q k v" takes some of them only, --tokens 1,4 some numbers of tokens.

Each product is timed inside a CUDA graph that goes through copies of the weight larger than the L2
cache, so that weights come from memory and the host's launches do not count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from bench.ceilings import device_bytes_per_s
from bench.record import finish
from common.blocks import code_bytes, packed_bytes, scale_count
from engine.cuts import tokens_cut
from engine.packed_weight import Packed
from engine.w4a16 import (
    RING,
    Epilogue,
    RingCut,
    Scratch,
    TokensCut,
    dependent_launch,
    multiply_one,
    multiply_tokens,
    spread,
)

#: Rows of the weights that share an input, and columns: those of a 32B model, and parts of them.
SHAPES: dict[str, tuple[list[int], int]] = {
    "q k v": ([5120, 1024, 1024], 5120),
    "o": ([5120], 5120),
    "gate up": ([27648, 27648], 5120),
    "down": ([5120], 27648),
    "lm_head": ([152064], 5120),
    "gate": ([27648], 5120),
    "k": ([1024], 5120),
}
TOKENS = (1, 4, 8, 16)
COLD_BYTES = 160 << 20


def make(rows: list[int], columns: int) -> list[Packed]:
    """Random weights in one piece of memory, as slots are."""
    sizes = [-(-(packed_bytes(n * columns) + 512) // 512) * 512 for n in rows]
    memory = torch.empty(sum(sizes), dtype=torch.uint8, device="cuda").random_()
    weights, at = [], 0
    for count, size in zip(rows, sizes, strict=True):
        elements = count * columns
        codes = memory[at:][: code_bytes(elements)]
        scales_at = at + -(-code_bytes(elements) // 256) * 256
        scales = memory[scales_at:][: 2 * scale_count(elements)].view(torch.bfloat16)
        scales.copy_(torch.rand(scales.numel(), device="cuda") * 0.01)
        weights.append(Packed(codes, scales, (count, columns)))
        at += size
    return weights


def graph_us(calls: Sequence[Callable[[], object]], replays: int = 5) -> float:
    """Microseconds a call: the fastest of several replays of all of them in one graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return min(times[1:])


Cut = RingCut | TokensCut


#: Stages, programs on a multiprocessor, registers, warps: as many as fit, and fewer with a longer ring.
RINGS = (
    (3, 12, 80, 2),
    (3, 13, 112, 1),
    (3, 12, 128, 1),
    (3, 13, 72, 2),
    (3, 8, 80, 2),
    (3, 6, 80, 2),
    (4, 8, 96, 2),
    (4, 8, 64, 4),
)


def cuts(tokens: int, rows: list[int], columns: int) -> Iterable[Cut]:
    """What is tried."""
    total = sum(rows)
    if tokens == 1:
        for ring in RINGS:
            yield RingCut(*ring)
        return
    chosen = tokens_cut(tuple(rows), columns).parts
    # The order of sums follows from the parts: more of them are for all products of these columns, or none.
    for size, warps, stages, split, parts in itertools.product(
        (16, 32, 64, 128), (1, 2, 4), (3, 4, 6), (False, True), (chosen, 2 * chosen)
    ):
        programs = total // size * (parts if split else 1)
        if size >= 16 * warps and 128 <= programs <= 8000 and (split or parts == chosen):
            yield TokensCut(size, parts, split, warps, stages)


def product(
    tokens: int, planes: torch.Tensor, y: torch.Tensor, scratch: Scratch, weights: list[Packed],
    cut: Cut | None = None,
) -> None:  # fmt: skip
    """One launch."""
    if tokens == 1:
        assert not isinstance(cut, TokensCut)
        pdl = dependent_launch(planes.device)
        multiply_one(planes, weights, None, y, scratch, Epilogue(pdl=pdl), cut or RING)
    else:
        assert cut is None or isinstance(cut, TokensCut)
        multiply_tokens(planes, tokens, weights, None, y, scratch, cut)


def tune(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fastest few of each product. Children compile first, in parallel, into Triton's cache."""
    total = os.cpu_count() or 1
    children = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "bench.kernels",
                "compile",
                f"--share={i}/{total}",
                f"--products={','.join(arguments.products)}",
                f"--tokens={','.join(map(str, arguments.tokens))}",
            ]
        )
        for i in range(total)
    ]
    for child in children:
        child.wait()
    print("compiled", time.strftime("%X"), file=sys.stderr, flush=True)
    found: dict[str, Any] = {}
    for name in arguments.products:
        rows, columns = SHAPES[name]
        size = sum(packed_bytes(n * columns) for n in rows)
        copies = [make(rows, columns) for _ in range(max(2, min(40, COLD_BYTES // size)))]
        for tokens in arguments.tokens:
            x = torch.randn(tokens, columns, device="cuda").to(torch.bfloat16)
            scratch = Scratch(x.device)
            scratch.hold(1 << 23, 1 << 16)
            planes = spread(x)
            y = torch.empty((tokens, sum(rows)), dtype=torch.bfloat16, device="cuda")
            results = []
            for cut in cuts(tokens, rows, columns):
                try:
                    calls = [
                        partial(product, tokens, planes, y, scratch, weights, cut)
                        for weights in copies
                    ]
                    results.append((graph_us(calls), cut))
                except Exception as error:  # too much shared memory, mostly
                    print(name, tokens, cut, repr(error)[:200], file=sys.stderr)
            results.sort(key=lambda result: result[0])
            found[f"{name} x{tokens}"] = [
                {"us": us, "GB/s": size / us / 1000, **asdict(cut)} for us, cut in results[:6]
            ]
            best = found[f"{name} x{tokens}"][:3]
            print(name, tokens, [(round(b["us"], 1), round(b["GB/s"]), *list(b.values())[2:]) for b in best],
                  file=sys.stderr, flush=True)  # fmt: skip
    return {"device_bytes_per_s": device_bytes_per_s(torch.device("cuda")), "fastest": found}


def compile_share(arguments: argparse.Namespace) -> None:
    """Run a share of all configurations once."""
    index, total = map(int, arguments.share.split("/"))
    work, seen = [], set()
    for rows, columns in (SHAPES[name] for name in arguments.products):
        for tokens in arguments.tokens:
            for cut in cuts(tokens, rows, columns):
                # Of one token, K is compiled in.
                key = (columns if tokens == 1 else 0, len(rows), cut)
                if key not in seen:
                    seen.add(key)
                    work.append((rows, columns, tokens, cut))
    scratch = Scratch(torch.device("cuda"))
    scratch.hold(1 << 23, 1 << 16)
    made: dict[str, list[Packed]] = {}
    for rows, columns, tokens, cut in work[index::total]:
        name = f"{rows} {columns}"
        if name not in made:
            made.clear()
            made[name] = make(rows, columns)
        planes = spread(torch.randn(tokens, columns, device="cuda").to(torch.bfloat16))
        y = torch.empty((tokens, sum(rows)), dtype=torch.bfloat16, device="cuda")
        try:
            product(tokens, planes, y, scratch, made[name], cut)
        except Exception:
            pass  # said when it is timed


def table(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ours with the configurations that are chosen, tinygemm, and cuBLAS in bf16."""
    bandwidth = device_bytes_per_s(torch.device("cuda"))
    rows_found = []
    for name in arguments.products:
        rows, columns = SHAPES[name]
        total = sum(rows)
        size = sum(packed_bytes(n * columns) for n in rows)
        count = max(2, min(40, COLD_BYTES // size))
        copies = [make(rows, columns) for _ in range(count)]
        others = [tinygemm_operands(total, columns) for _ in range(count)]
        dense = [torch.randn(total, columns, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        for tokens in arguments.tokens:
            x = torch.randn(tokens, columns, device="cuda").to(torch.bfloat16)
            scratch = Scratch(x.device)
            planes = spread(x)
            y = torch.empty((tokens, total), dtype=torch.bfloat16, device="cuda")
            ours = graph_us([partial(product, tokens, planes, y, scratch, w) for w in copies])
            tiny = torch.ops.aten._weight_int4pack_mm
            tinygemm = graph_us([partial(tiny, x, w[0], 128, w[1]) for w in others])
            cublas = graph_us([partial(torch.nn.functional.linear, x, w) for w in dense])
            row = {
                "shape": name, "rows": rows, "columns": columns, "tokens": tokens, "us": ours,
                "bytes_per_s": size / ours * 1e6, "share": size / ours * 1e6 / bandwidth,
                "tinygemm_us": tinygemm, "cublas_bf16_us": cublas,
            }  # fmt: skip
            rows_found.append(row)
            print(
                f"{name:8} x{tokens:<3} {ours:7.1f} us {100 * row['share']:5.1f} %"
                f"  tinygemm {tinygemm:7.1f}  cublas {cublas:7.1f}", file=sys.stderr, flush=True,
            )  # fmt: skip
        del copies, others, dense
        torch.cuda.empty_cache()
    return {"device_bytes_per_s": bandwidth, "products": rows_found}


def products(text: str) -> list[str]:
    """Some of SHAPES, by name; argparse says what is wrong."""
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        known = ", ".join(SHAPES)
        raise argparse.ArgumentTypeError(f"no product {unknown[0]!r}: expected some of {known}")
    return names


def tinygemm_operands(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Operands of torch's own ``_weight_int4pack_mm``: blocks of 128, scales and zeros in bf16."""
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(columns // 128, rows, 2, device="cuda").to(torch.bfloat16)
    return packed, scales


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", choices=("tune", "table", "compile"))
    parser.add_argument(
        "--tokens", type=lambda t: [int(n) for n in t.split(",")], default=list(TOKENS)
    )
    parser.add_argument("--products", type=products, default=list(SHAPES))
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--output")
    chosen = parser.parse_args()
    if chosen.part == "compile":
        compile_share(chosen)
    else:
        measured = tune(chosen) if chosen.part == "tune" else table(chosen)
        print(json.dumps(finish(measured, chosen.output)))
