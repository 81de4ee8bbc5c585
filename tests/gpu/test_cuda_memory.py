"""Segments of device memory are one memory in two processes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from common.errors import MemoryShortageError, PeerError
from common.memory import memory_for
from tests.processes import ROOT

PEER = """
import sys, torch
from common.memory import memory_for
memory = memory_for(sys.argv[1])
segment = memory.open("cuda-ipc", bytes.fromhex(sys.argv[2]), int(sys.argv[3]))
print(int(segment.tensor.sum(dtype=torch.int64)))
segment.tensor[:3] = 7
torch.cuda.synchronize()
segment.close()
"""


def test_a_peer_reads_and_writes_the_same_bytes() -> None:
    memory = memory_for("cuda")
    segment = memory.allocate(1 << 20)
    size = segment.tensor.numel()  # whole pages of device memory
    segment.tensor.copy_(torch.randint(256, (size,), dtype=torch.uint8))
    torch.cuda.synchronize()
    total = int(segment.tensor.sum(dtype=torch.int64))
    before = segment.tensor.clone()
    run = subprocess.run(
        [sys.executable, "-c", PEER, memory.identity, segment.handle.hex(), str(size)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(run.stdout) == total
    assert segment.tensor[:3].tolist() == [7, 7, 7]
    assert torch.equal(segment.tensor[3:], before[3:])
    segment.close()


def test_what_cannot_be_is_said() -> None:
    memory = memory_for("cuda")
    with pytest.raises(MemoryShortageError):
        memory.allocate(1 << 42)
    with pytest.raises(PeerError, match="cuda-ipc"):
        memory.open("shm", b"/proc/self/fd/0", 4096)
    with pytest.raises(PeerError):
        memory.open("cuda-ipc", bytes(64), 4096)
    # The failures above must not stay behind as a sticky error.
    assert float(torch.ones(3, device="cuda").sum()) == 3.0


def test_memory_goes_back() -> None:
    memory = memory_for("cuda")
    torch.cuda.synchronize()
    free = memory.free_bytes()
    segment = memory.allocate(256 << 20)
    assert memory.free_bytes() <= free - (256 << 20)
    segment.close()
    assert memory.free_bytes() == free
    pageable = torch.zeros(4 << 20, dtype=torch.uint8)
    unpin = memory.pin(pageable)
    assert pageable.is_pinned()
    unpin()
    assert not pageable.is_pinned()
