"""A table in host memory gives the rows that the plain one gives, to the bit."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from common.errors import MemoryShortageError
from common.memory import CpuMemory
from engine.embedding import host_table

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_the_plain_table(stored: torch.dtype, dtype: torch.dtype) -> None:
    table = torch.randn(331, 77, generator=torch.Generator().manual_seed(4)).to(stored)
    ids = torch.tensor([[0, 330, 5, 5], [17, 0, 329, 200]])
    found = host_table(table, dtype, CpuMemory())
    assert found.dtype == dtype and found.shape == table.shape and found.is_contiguous()
    expected = nn.functional.embedding(ids, table.to(dtype))
    assert torch.equal(nn.functional.embedding(ids, found), expected)
    assert torch.equal(found, table.to(dtype))


def test_it_is_a_copy_that_lives_as_long_as_it_is_looked_at() -> None:
    table = torch.ones(64, 64)
    found = host_table(table, torch.float32, CpuMemory())
    table.zero_()
    row = found[3]
    gone = weakref.ref(found)
    del found
    gc.collect()
    assert gone() is None
    assert bool((row == 1).all())


def test_a_host_without_room_says_so() -> None:
    table = torch.empty(1 << 30, 1 << 14, dtype=torch.bfloat16, device="meta")
    with pytest.raises(MemoryShortageError, match="the embedding needs .* bytes of host memory"):
        host_table(table, torch.bfloat16, CpuMemory())
