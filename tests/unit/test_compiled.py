"""Kernels as they are compiled for devices that are not here: they find room in registers and shared memory.

A kernel that spills is slow, one that wants more shared memory than there is does not start, and neither
shows where there is no such device.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from common.dequantize import BLOCKS_PER_PROGRAM, _dequantize_kernel
from engine.batch.kernels import ALIGNED, TILE, TILES, _chunks_kernel, launch_options
from engine.cuts import tokens_cut
from engine.one_token import (
    GLU,
    PLAIN,
    RESIDUAL,
    attention_kernel,
    attention_warps,
    combine_kernel,
)
from engine.ring import TILE as RING_TILE
from engine.ring import UNIT, ring_kernel
from engine.step import TILE_TOKENS
from engine.w4a16 import MAX_TOKENS, RING, _tokens_kernel

#: Compute capability, and the most bytes of shared memory that a program may have: RTX 30 (RTX 40, which
#: is 89, gets nearly the same code); H100; RTX 50.
DEVICES = {86: 99 << 10, 90: 227 << 10, 120: 99 << 10}
OLD, OLD_SHARED = 75, 64 << 10  # RTX 20 and T4, without arithmetic of bf16
#: What comes nearest to a limit; of other devices than the first only that is looked at.
TIGHT = ("gate, up", "attention", "attention, large heads", "attention of many, large heads")
DEPENDENT = 90  # from here on kernels are launched before the one before has ended
BLOCK = 128
#: Bytes: a few numbers of a thread, not those of a loop. Attention over long contexts has 40 to 112.
MOST_STACK = 192
#: What parameters are, by name; all others are 32-bit integers.
KINDS = {
    "fp32": ("eps", "scale"),
    "*fp32": (
        "planes", "sums", "hidden", "next_planes", "next_sums", "qkv", "partial", "peaks", "parts", "y",
    ),
    "*bf16": (
        "scales", "bias", "norm", "q_norm", "k_norm", "cosines", "sines", "keys", "values", "query",
        "key", "value", "memory", "output",
    ),
    "*i32": ("words", "counters", "position", "rows", "lengths"),
    "*i64": ("places",),
    "*i8": ("pairs",),
}  # fmt: skip
#: Integers that are multiples of 16 wherever they are given.
EVEN = {"code0", "code1", "code2", "total", "capacity"}


#: What is more than 2**31 units from the first weight, one of them or both.
FAR = {"code1": "i64", "scale1": "i64", "code2": "i64", "scale2": "i64"}
FAR_SCALES = {"scale1": "i64", "scale2": "i64"}


def ring(
    mode: int, columns: int, pdl: bool, kinds: dict[str, str] | None = None
) -> tuple[Any, ...]:
    constants = {
        "K": columns, "TILE": RING_TILE, "RUNS": UNIT // BLOCK, "PARTS": -(-columns // UNIT),
        "STAGES": RING.stages, "BIAS": False, "RUN": BLOCK, "MODE": mode,
        "NORM": mode != int(RESIDUAL), "SUMS": 512, "AT_ONCE": 128, "PDL": pdl,
        "EARLY": RING.early, "ASM": True,
    }  # fmt: skip
    options = {"num_warps": RING.warps, "maxnreg": RING.registers}
    return ring_kernel, constants, options | ({"launch_pdl": True} if pdl else {}), kinds or {}


def tokens(
    rows: tuple[int, ...], columns: int, asm: bool, pdl: bool, kinds: dict[str, str] | None = None
) -> tuple[Any, ...]:
    cut = tokens_cut(rows, columns)
    constants = {
        "ROWS": cut.rows, "SPLIT": cut.parts if cut.split else 1, "BIAS": True, "RUN": BLOCK,
        "TOKENS": MAX_TOKENS, "ASM": asm, "PARTS": cut.parts, "PDL": pdl,
    }  # fmt: skip
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    wide = {"planes": "*bf16", "y": "*bf16"} | (kinds or {})
    return _tokens_kernel, constants, options | ({"launch_pdl": True} if pdl else {}), wide


def attention(dim: int, head_norm: bool, pdl: bool) -> tuple[Any, ...]:
    constants = {
        "HEADS": 40, "GROUP": 5, "PADDED": 16, "DIM": dim, "TILE": TILE_TOKENS, "TILES": 2,
        "CHUNKS": 64, "KV": 8, "HEAD_NORM": head_norm, "PDL": pdl,
    }  # fmt: skip
    options: dict[str, Any] = {"num_warps": attention_warps(dim)}
    return attention_kernel, constants, options | ({"launch_pdl": True} if pdl else {}), {}


def combine(pdl: bool) -> tuple[Any, ...]:
    constants = {
        "HEADS": 40, "GROUP": 5, "PADDED": 16, "DIM": 128, "CHUNK": 64, "CHUNKS": 64, "KV": 8,
        "PDL": pdl,
    }  # fmt: skip
    options: dict[str, Any] = {"num_warps": attention_warps(128)}
    return combine_kernel, constants, options | ({"launch_pdl": True} if pdl else {}), {}


def chunks(dim: int) -> tuple[Any, ...]:
    constants = {
        "GROUP": 5, "PADDED": 16, "DIM": dim, "KV": 8, "TILE": TILE, "TILES": TILES,
        "ALIGNED": ALIGNED,
    }  # fmt: skip
    return _chunks_kernel, constants, launch_options(dim), {}


def dequantizer() -> tuple[Any, ...]:
    kinds = {"codes": "*u8", "out": "*bf16", "elements": "i64"}
    return _dequantize_kernel, {"BLOCKS": BLOCKS_PER_PROGRAM}, {"num_warps": 4}, kinds


def kernels(device: int) -> dict[str, tuple[Any, ...]]:
    """Of a 32B model, a 7B one, and one with heads of 256 elements."""
    pdl, asm = device >= DEPENDENT, device != OLD
    return {
        "gate, up": ring(int(GLU), 5120, pdl),
        "gate, far from up": ring(int(GLU), 5120, pdl, FAR),
        "gate, with scales far from up's": ring(int(GLU), 5120, pdl, FAR_SCALES),
        "q, far from k and v": ring(int(PLAIN), 5120, pdl, FAR_SCALES),
        "down": ring(int(RESIDUAL), 27648, pdl),
        "gate, up of some tokens": tokens((27648, 27648), 5120, asm, pdl),
        "gate, far from up, of some tokens": tokens((27648, 27648), 5120, asm, pdl, FAR_SCALES),
        "o of some tokens": tokens((3584,), 3584, asm, pdl),
        "attention": attention(128, False, pdl),
        "attention, norms of heads": attention(128, True, pdl),
        "attention, large heads": attention(256, False, pdl),
        "chunks put together": combine(pdl),
        "attention of many": chunks(128),
        "attention of many, large heads": chunks(256),
        "dequantizer": dequantizer(),
    }


def compiled(device: int, kernel: Any, constants: Any, options: Any, kinds: Any) -> Any:
    names = kernel.arg_names
    kinds = {name: kind for kind, several in KINDS.items() for name in several} | kinds
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    even = [n for n in names if signature[n].startswith("*") or n in EVEN]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    return triton.compile(source, target=GPUTarget("cuda", device, 32), options=options)


def stack_bytes(cubin: bytes, path: Path) -> int:
    """What a thread keeps in memory because registers do not suffice."""
    path.write_bytes(cubin)
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    done = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    return int(re.findall(r"STACK:(\d+)", done.stdout)[-1])


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("device", DEVICES)
def test_kernels_find_room(device: int, tmp_path: Path) -> None:
    found = {}
    for name, kernel in kernels(device).items():
        if device != min(DEVICES) and name not in TIGHT:
            continue
        done = compiled(device, *kernel)
        stack = stack_bytes(done.asm["cubin"], tmp_path / "kernel")
        found[name] = (done.metadata.shared, stack)
    for name, (shared, stack) in found.items():
        assert shared <= DEVICES[device], (name, shared)
        assert stack <= MOST_STACK, (name, stack)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("name", ["down", "o of some tokens", "attention", "dequantizer"])
def test_an_old_device_can_do_it_slowly(name: str) -> None:
    done = compiled(OLD, *kernels(OLD)[name])
    assert done.metadata.shared <= OLD_SHARED


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    "rows, columns",
    [
        ((5120, 1024, 1024), 5120), ((27648, 27648), 5120), ((12288, 12288), 5120),
        ((3584, 512, 512), 3584), ((18944, 18944), 3584), ((29568, 29568), 8192),
    ],
)  # fmt: skip
def test_weights_that_share_an_input_take_one_instruction(
    rows: tuple[int, ...], columns: int
) -> None:
    """Together and alone, with several tokens: another instruction may round otherwise."""
    cuts = {tokens_cut(some, columns) for some in (rows, *((count,) for count in rows))}
    assert len({cut.parts for cut in cuts}) == 1
    found = set()
    for some in {rows, *((count,) for count in rows)}:
        ptx = compiled(90, *tokens(some, columns, True, True)).asm["ptx"]
        found.add(frozenset(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)[\w.]*", ptx)))
    assert len(found) == 1 and len(*found) == 1, found
