"""Measuring a GPU gives back what it took; plan and doctor know the card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common.memory import CudaMemory, memory_for
from common.store import Store
from feeder.host import HostStore
from feeder.measure import measure
from feeder.outlook import pci_address
from tests.processes import Room
from tests.stores import write_store

#: What a library that was used for the first time may keep for itself.
LIBRARIES_BYTES = 256 << 20


def test_measuring_gives_memory_back(tmp_path: Path) -> None:
    memory = memory_for("cuda")
    assert isinstance(memory, CudaMemory)
    host = HostStore.load(Store.open(write_store(tmp_path / "store")), memory)
    try:
        before = memory.free_bytes()
        found = measure(host, memory, torch.bfloat16)
        assert found is not None and found.device_name == torch.cuda.get_device_name()
        assert before - memory.free_bytes() < LIBRARIES_BYTES
        assert memory.allocated == 0
        assert memory.peak_bytes() <= LIBRARIES_BYTES
        again = memory.free_bytes()
        measure(host, memory, torch.bfloat16)
        assert abs(again - memory.free_bytes()) < 32 << 20
    finally:
        host.close()
    assert 1e11 < found.device < 1e14
    assert 1e13 < found.matmul < 1e16
    assert 1e-7 < found.launch_s < 1e-3


def test_measuring_where_nothing_is_free(tmp_path: Path) -> None:
    memory = memory_for("cuda")
    host = HostStore.load(Store.open(write_store(tmp_path / "store")), memory)
    segment = memory.allocate(memory.free_bytes() - (24 << 20))
    try:
        measure(host, memory, torch.bfloat16)  # None or figures, but no exception
    finally:
        segment.close()
        host.close()


def test_the_card_has_an_address() -> None:
    memory = memory_for("cuda")
    assert isinstance(memory, CudaMemory)
    domain, bus, rest = pci_address(memory).split(":")
    assert len(rest.split(".")) == 2
    assert int(domain, 16) >= 0 and int(bus, 16) >= 0


def test_the_plan(room: Room) -> None:
    ended = room.launch("--plan", "--json").wait()
    assert ended.code == 0, ended.err
    plan = json.loads(ended.out)
    assert plan["device"] == "cuda"
    assert plan["predicted"]["tok_per_s"] > 0
    lines = room.launch("--plan").wait().out.splitlines()
    assert f"; {torch.cuda.get_device_name()}: link " in lines[0]


def test_the_doctor(room: Room) -> None:
    ended = room.launch("doctor", "--json").wait()
    checks = {check["name"]: check for check in json.loads(ended.out)["checks"]}
    for name in ("driver", "cuda:0", "compute mode", "MPS", "memlock", "pinned memory", "PCIe"):
        assert name in checks, ended.out
    assert checks["sharing"]["found"] == "another process read cuda-ipc memory of this one"
    assert ended.code == (0 if json.loads(ended.out)["ok"] else 1)


@pytest.mark.parametrize("flags", [(), ("--slots=dequantized", "--strategy=resident")])
def test_a_run_begins_with_its_plan(room: Room, flags: tuple[str, ...]) -> None:
    ended = room.launch("--greedy", "--max-new-tokens=8", *flags).wait()
    assert ended.code == 0, ended.err
    planned = [line for line in ended.err.splitlines() if line.startswith("feeder: plan: ")]
    assert 3 <= len(planned) <= 5
