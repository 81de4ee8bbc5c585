"""Attention of many single tokens, in Triton's interpreter, against float64. In fp16: the interpreter cuts
fp32 to bf16 where a GPU rounds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from common.dequantize import interpreted
from engine.batch.kernels import CHUNK, ManyPasts

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 2


def check(heads: int, kv: int, dim: int, lengths: list[int], others: int) -> None:
    """``others``: rows of the pass that are none of these sequences'."""
    generator = torch.Generator().manual_seed(heads + dim)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).half()

    count = len(lengths) + others
    rows = torch.randperm(count, generator=generator)[: len(lengths)].tolist()
    pasts = []
    for length in lengths:
        capacity = length + 1 + 7 * (length % 3)
        pasts.append(
            [(normal(1, kv, capacity, dim), normal(1, kv, capacity, dim)) for _ in range(LAYERS)]
        )
    before = [[(keys.clone(), values.clone()) for keys, values in layers] for layers in pasts]
    many = ManyPasts(pasts, lengths, rows, heads)
    for layer in range(LAYERS):
        # As a model gives them: by row first.
        query = normal(1, count, heads, dim).transpose(1, 2)
        key, value = (normal(1, count, kv, dim).transpose(1, 2) for _ in range(2))
        output = torch.full((1, count, heads, dim), torch.nan, dtype=torch.float16)
        many.attend(layer, query, key, value, dim**-0.5, output)
        for one, (length, row) in enumerate(zip(lengths, rows, strict=True)):
            for part, new, old in zip(
                pasts[one][layer], (key, value), before[one][layer], strict=True
            ):
                old[:, :, length] = new[:, :, row]
                assert torch.equal(part, old)  # one is appended, and nothing else is written
            keys, values = (part[:, :, : length + 1].double() for part in pasts[one][layer])
            wanted = scaled_dot_product_attention(
                query[:, :, row : row + 1].double(), keys, values, enable_gqa=True
            )
            error = (output[:, row].double() - wanted[:, :, 0]).abs().max()
            assert error < 4e-3, (heads, kv, dim, length, float(error))
        mine = torch.zeros(count, dtype=torch.bool)
        mine[rows] = True
        assert output[:, ~mine].isnan().all() and not output[:, mine].isnan().any()


def check_all() -> None:
    check(4, 2, 32, [1, 5, 64, 63, 200], others=3)
    check(6, 1, 64, [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 70], others=0)
    check(2, 2, 128, [9], others=1)


def test_in_the_interpreter() -> None:
    if interpreted():
        pytest.skip("for the process that this test starts")
    code = "from tests.unit.test_batch_kernels import check_all; check_all()"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
