"""What is copied to measure the link, and that measuring leaves the process as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.memory import PIN_CHUNK_BYTES, CpuMemory
from common.store import Store
from feeder.host import HostStore
from feeder.measure import PIECE_BYTES, ROUND_PIECES, measure, pieces
from tests.stores import write_store


@given(size=st.integers(1, 40 << 30), piece=st.integers(1 << 20, PIECE_BYTES))
def test_pieces_lie_in_the_store_and_cross_no_chunk(size: int, piece: int) -> None:
    found = pieces(size, piece)
    assert 0 < len(found) <= 2 * ROUND_PIECES
    for start, length in found:
        assert length == min(piece, size)
        assert start >= 0 and start + length <= size
        assert start // PIN_CHUNK_BYTES == (start + length - 1) // PIN_CHUNK_BYTES
    starts = [start for start, _ in found]
    assert starts == sorted(set(starts))


def test_pieces_are_spread_over_a_large_store() -> None:
    starts = [start for start, _ in pieces(16 << 30)]
    assert starts[0] == 0
    assert starts[-1] >= 13 << 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_cpu(tmp_path: Path, dtype: torch.dtype) -> None:
    memory = CpuMemory()
    host = HostStore.load(Store.open(write_store(tmp_path / "store")), memory)
    threads = torch.get_num_threads()
    try:
        found = measure(host, memory, dtype)
    finally:
        host.close()
    assert torch.get_num_threads() == threads
    assert memory.peak_bytes() == 0
    assert found is not None and found.device_name == "CPU"
    assert 0 < found.link < 1e12
    assert 0 < found.device < 1e13
    assert 0 < found.matmul < 1e14
    assert 0 < found.launch_s < 1
    assert 0 < found.dequantize < found.link
