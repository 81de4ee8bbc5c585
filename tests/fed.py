"""The engine's side in the test's own process, fed by a feeder in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from common import int4
from common.formats import PACKED
from common.memory import Memory, memory_for
from common.store import Store
from engine.client import WeightClient
from engine.draft import Draft, lent_draft
from engine.ledger import Lease
from engine.model import build_model
from tests.processes import Process, Room


@dataclass
class Engine:
    """A client that is connected."""

    client: WeightClient
    feeder: Process
    memory: Memory
    store: Store
    dtype: torch.dtype

    @cached_property
    def expected(self) -> list[torch.Tensor]:
        """By weight: what every lease of it must hold. Made when asked for: it takes long of large stores."""
        return [
            int4.dequantize(*self.store.read_weight(entry), entry.shape, self.dtype).to(
                self.memory.device
            )
            for entry in self.store.weights
        ]

    def holds(self, lease: Lease, weight: int) -> bool:
        """Whether the lease's slot holds exactly the store's weight, packed or dequantized."""
        entry = self.store.weights[weight]
        shape = entry.shape
        if lease.grant.format == PACKED:
            packed = lease.packed(shape)
            codes, scales = self.store.read_weight(entry)
            return torch.equal(packed.codes.cpu(), codes) and torch.equal(
                packed.scales.cpu().view(torch.int16), scales.view(torch.int16)
            )
        return torch.equal(lease.weight(self.dtype, shape), self.expected[weight])


@contextmanager
def engine(room: Room, store: Path, *flags: object, module: str = "feeder") -> Iterator[Engine]:
    """Start a feeder of ``store`` with ``flags`` and connect to it."""
    feeder = room.feeder("--model", store, *flags, module=module)
    with connected(room, feeder) as engine:
        yield engine


@contextmanager
def connected(
    room: Room, feeder: Process, name: str = "default", verify: bool = False
) -> Iterator[Engine]:
    """Connect to a feeder that is there."""
    client = WeightClient(room.directory(name), verify=verify)
    try:
        welcome = client.wait_for_feeder()
        memory = memory_for(welcome.device)
        client.use(memory)
        opened = Store.open(Path(welcome.store))
        dtype = getattr(torch, welcome.dtype)
        yield Engine(client, feeder, memory, opened, dtype)
        if memory.device.type == "cuda":
            torch.cuda.synchronize(memory.device)
    finally:
        client.close()


@contextmanager
def model(
    room: Room, store: Path, *flags: object, attention: str = "auto"
) -> Iterator[tuple[Any, Engine]]:
    """The model as an engine builds it, with a feeder of its own."""
    with engine(room, store, *flags) as it:
        yield build(it, attention), it


def build(engine: Engine, attention: str = "auto") -> Any:
    """The model whose Linears an engine's client feeds."""
    return build_model(engine.store, engine.client, engine.memory, engine.dtype, attention)


def draft(engine: Engine) -> Draft:
    """The draft that the engine's feeder lends."""
    return lent_draft(engine.client, engine.store, engine.memory, engine.dtype)
