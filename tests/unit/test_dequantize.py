"""The dequantizer: the kernel in Triton's interpreter equals the reference, and its launcher checks.

The interpreter (of Triton 3.9) cuts fp32 to bf16 where a GPU rounds to the nearest even, and takes the
smallest bf16 for 0. So there bf16 is compared where nothing has to be rounded; how the kernel rounds is
for tests/gpu to show.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common import int4
from common.dequantize import BLOCKS_PER_PROGRAM, dequantize_into, interpreted

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE = BLOCKS_PER_PROGRAM * 128  # what one program of the kernel does
SIZES = (1, 2, 3, 127, 128, 129, 255, 1001, TILE - 1, TILE, TILE + 1, 3 * TILE + 77, 4 * TILE)
MARGIN = 64  # elements on both sides of the output, which must stay as they are


def packed(elements: int, seed: int, round_bits: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes, -8 too, and scales of every magnitude, also the smallest and the largest.

    ``round_bits``: so many of the last bits of each scale are 0.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (elements,), generator=generator).to(torch.int8)
    bits = torch.randint(0, 0x7F80, (int4.scale_count(elements),), generator=generator)
    bits[::3] = 0x3C00 + bits[::3] % 0x0400  # most are those of real weights
    bits[:4] = torch.tensor([0, 0x7F7F, 0x0080, 1])[: bits.numel()]
    bits &= -1 << round_bits
    return int4.pack(codes), bits.to(torch.int16).view(torch.bfloat16)


def check(elements: int, dtype: torch.dtype, seed: int, round_bits: int = 0) -> None:
    """Dequantize into the middle of a buffer and compare every bit."""
    codes, scales = packed(elements, seed, round_bits)
    if interpreted():
        scales = torch.where(scales < 2.0**-120, 0.0, scales)
    buffer = torch.full((elements + 2 * MARGIN,), -1.0, dtype=dtype)
    dequantize_into(codes, scales, buffer[MARGIN : MARGIN + elements])
    expected = torch.full_like(buffer, -1.0)
    expected[MARGIN:-MARGIN] = int4.dequantize(codes, scales, (elements,), dtype)
    same = buffer.view(torch.uint8).equal(expected.view(torch.uint8))
    assert same, f"{elements} elements of {dtype} differ"


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_cpu_it_is_the_reference(dtype: torch.dtype) -> None:
    assert not interpreted()
    for seed, elements in enumerate(SIZES):
        check(elements, dtype, seed)


def test_the_kernel_equals_the_reference_bit_for_bit() -> None:
    """In a process of its own: the interpreter is chosen when the kernel is defined."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.test_dequantize"],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(SIZES) * len(DTYPES)} equal, misaligned refused\n"


def good(elements: int = 300) -> dict[str, torch.Tensor]:
    codes, scales = packed(elements, 0)
    return {"codes": codes, "scales": scales, "out": torch.empty(elements)}


BAD: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "codes of int8": ("codes", lambda t: t.view(torch.int8)),
    "too few codes": ("codes", lambda t: t[:-1]),
    "too many codes": ("codes", lambda t: torch.cat((t, t[:1]))),
    "codes with gaps": ("codes", lambda t: t.repeat_interleave(2)[::2]),
    "codes elsewhere": ("codes", lambda t: t.to("meta")),
    "scales of fp16": ("scales", lambda t: t.half()),
    "scales as bits": ("scales", lambda t: t.view(torch.int16)),
    "too few scales": ("scales", lambda t: t[:-1]),
    "too many scales": ("scales", lambda t: torch.cat((t, t))),
    "scales with gaps": ("scales", lambda t: t.repeat_interleave(2)[::2]),
    "scales elsewhere": ("scales", lambda t: t.to("meta")),
    "out of fp64": ("out", lambda t: t.double()),
    "out of int32": ("out", lambda t: t.int()),
    "out with gaps": ("out", lambda t: t.repeat(2)[::2]),
}


@pytest.mark.parametrize("what", BAD)
def test_operands_that_do_not_fit_are_refused(what: str) -> None:
    name, spoil = BAD[what]
    operands = good()
    operands[name] = spoil(operands[name])
    with pytest.raises(ValueError, match=f"^{name} is .*: expected .* elements, cpu, contiguous$"):
        dequantize_into(**operands)


@pytest.mark.parametrize("elements", [298, 301, 256, 512])
def test_an_output_of_another_size_is_refused(elements: int) -> None:
    with pytest.raises(ValueError, match=r"^(codes|scales) is "):
        dequantize_into(**good() | {"out": torch.empty(elements)})


def test_an_output_of_any_shape_is_filled_in_order() -> None:
    operands = good(300)
    flat, square = operands["out"], torch.empty(15, 20)
    dequantize_into(**operands)
    dequantize_into(**operands | {"out": square})
    assert square.view(-1).equal(flat)


def main() -> None:
    """What runs in the interpreter."""
    assert interpreted()
    equal = 0
    for dtype in DTYPES:
        for seed, elements in enumerate(SIZES):
            # A scale of 5 significant bits times a code of 3 has the 8 of bf16.
            check(elements, dtype, seed, round_bits=3 if dtype == torch.bfloat16 else 0)
            equal += 1
    operands = good()
    shifted = {
        "codes": torch.cat((operands["codes"][:1], operands["codes"]))[1:],
        "out": torch.empty(301)[1:],
    }
    for name, tensor in shifted.items():
        try:
            dequantize_into(**operands | {name: tensor})
        except ValueError as error:
            assert str(error).startswith(f"{name} lies at 0x") and "16-byte" in str(error)
        else:
            raise AssertionError(f"misaligned {name} is taken")
    print(f"{equal} equal, misaligned refused")


if __name__ == "__main__":
    main()
