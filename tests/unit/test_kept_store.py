"""The host store that outlives its feeder: whole when it is taken over, or not taken at all."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from common.errors import MemoryShortageError, StoreCorruptError
from common.memory import CpuMemory
from common.shared import SHM_DIRECTORY
from common.store import Store
from feeder.host import HostStore
from feeder.quantize import quantize_checkpoint
from tests.checkpoints import make_checkpoint


class Unpinnable(CpuMemory):
    """As a host is whose limit of locked memory is too low."""

    def pin(self, tensor: torch.Tensor) -> Callable[[], None]:
        raise MemoryShortageError("memlock")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("kept")
    checkpoint = make_checkpoint(path / "model")
    quantize_checkpoint(checkpoint, path / "store", "cpu", progress=False)
    return Store.open(path / "store")


@pytest.fixture
def name(store: Store, request: pytest.FixtureRequest) -> Iterator[str]:
    """Of a whole store that somebody has left."""
    kept = f"weight-feeder,test,wf-{threading.get_native_id()},{request.node.name}"
    HostStore.load(store, CpuMemory(), kept).close()
    yield kept
    (SHM_DIRECTORY / kept).unlink()


def mapped(name: str) -> bool:
    """Whether this process still has it in memory; what waits for the collector of cycles counts."""
    return name in Path("/proc/self/maps").read_text()


def test_a_whole_one_is_taken_over(store: Store, name: str) -> None:
    found = HostStore.adopt(store, CpuMemory(), name)
    assert found is not None and mapped(name)
    for index, entry in enumerate(store.weights):
        store.check(entry, found.codes(index), found.scales(index))
    found.close()
    assert HostStore.adopt(store, CpuMemory(), f"{name}x") is None


@pytest.mark.parametrize("at", [0, -1])
def test_a_damaged_one_is_let_go_of(store: Store, name: str, at: int) -> None:
    """Its weight is named, and its memory free before another store is loaded."""
    entry = store.weights[at]
    whole = HostStore.adopt(store, CpuMemory(), name)
    assert whole is not None
    whole.scales(at).view(torch.uint8)[-1] ^= 16
    whole.close()
    del whole
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(StoreCorruptError, match=f"^{entry.name} is not what was loaded$") as e:
            HostStore.adopt(store, CpuMemory(), name)
        del e
        assert not mapped(name)
    finally:
        gc.enable()


def test_one_that_cannot_be_page_locked(store: Store, name: str) -> None:
    before = threading.active_count()
    with pytest.raises(MemoryShortageError, match="memlock"):
        HostStore.adopt(store, Unpinnable(), name)
    assert threading.active_count() == before
    gc.collect()
    assert not mapped(name)
