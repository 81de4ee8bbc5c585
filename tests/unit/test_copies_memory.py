"""How slot memory is shared out between dequantized slots and packed copies, on a device with pages."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.config import Cache
from common.errors import MemoryShortageError
from common.memory import PAGE_BYTES, CpuMemory
from common.store import Store
from feeder.quantize import quantize_checkpoint
from feeder.slot_memory import SlotMemory
from feeder.strategies.registry import make_strategy
from tests.checkpoints import make_checkpoint

FREE = 1 << 40


class DeviceMemory(CpuMemory):
    """Host memory that says it is a GPU's: what is shared out is arithmetic, and needs none."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cuda")

    def free_bytes(self) -> int:
        return FREE


class Beside:
    """Notes what it is told, in place of a filler."""

    def __init__(self) -> None:
        self.copies: Collection[int] = ()

    def use_staging(self, on: bool) -> None:
        pass

    def use_copies(self, weights: Collection[int]) -> None:
        self.copies = frozenset(weights)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Of 16 weights with a large lm_head, 36 MB in bf16, 9 packed."""
    path = tmp_path_factory.mktemp("copies")
    shape = {"hidden": 512, "intermediate": 1536, "layers": 2, "vocab": 24000}
    quantize_checkpoint(
        make_checkpoint(path / "model", **shape), path / "store", "cpu", progress=False
    )
    return Store.open(path / "store")


@given(data=st.data())
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_cache_size_gives_slots_that_hold_the_largest(
    store: Store, tmp_path: Path, data: st.DataObject
) -> None:
    everything = sum(2 * entry.elements for entry in store.weights)
    size = data.draw(st.integers(1 << 20, everything + (1 << 20)))
    beside = Beside()

    def slots(cache: str) -> SlotMemory:
        return SlotMemory(
            store, DeviceMemory(), torch.bfloat16, tmp_path, Cache.parse(cache),
            make_strategy("resident"), "dequantized", beside,
        )  # fmt: skip

    try:
        made = slots(f"{size}B")
    except MemoryShortageError:
        assert size < max(2 * entry.elements for entry in store.weights) + 512
        return
    assert made.capacity.size_bytes >= max(made.sizes)
    assert made.copies == beside.copies
    taken = made.capacity.size_bytes + made.copies_bytes(made.copies)
    assert taken <= min(size, sum(made.sizes))
    assert made.copies_bytes(made.copies) % PAGE_BYTES == 0
    if size >= sum(made.sizes):
        assert not made.copies
    strategy = make_strategy("resident")
    strategy.copied = made.copies
    strategy.begin(made.plan, made.sizes, made.capacity)
    assert not strategy.keep & made.copies
    # A shrink takes copies first, and leaves the largest weight a slot.
    spare = made.spare_bytes(PAGE_BYTES + 1)
    before = made.capacity.size_bytes
    if spare:
        made.shrink(spare)
        now = made.capacity.size_bytes + made.copies_bytes(made.copies)
        assert now <= taken - spare
        assert max(made.sizes) <= made.capacity.size_bytes <= before
    made.close()


def test_a_number_of_slots_leaves_copies_out(store: Store, tmp_path: Path) -> None:
    made = SlotMemory(
        store, DeviceMemory(), torch.bfloat16, tmp_path, Cache.parse("5"),
        make_strategy("resident"), "dequantized", Beside(),
    )  # fmt: skip
    assert made.copies == frozenset()
    made.close()
