"""Finds what a forecast needs, of this machine and of the feeder that is about to serve."""

from __future__ import annotations

import json

import torch

from common.config import Cache
from common.errors import WeightFeederError
from common.formats import PACKED
from common.log import log
from common.memory import CudaMemory, Memory
from feeder import forecast as f
from feeder import plan_text, topology
from feeder.budget import slot_formats
from feeder.host import HostStore
from feeder.measure import measure
from feeder.mps import mps_running
from feeder.scheduler import Scheduler
from feeder.simulation import Traffic
from feeder.slot_memory import SlotMemory
from feeder.strategies.registry import make_strategy


class Outlook:
    """Made before the slots are allocated, since it measures with memory that they will take."""

    def __init__(self, host: HostStore, memory: Memory, dtype: torch.dtype) -> None:
        measured = measure(host, memory, dtype)
        if isinstance(memory, CudaMemory):
            address = pci_address(memory)
            pcie = topology.pcie_link(address)  # at once, before the link goes to sleep
            node = topology.gpu_node(address)
            far_share = topology.far_share(host.tensor.data_ptr(), node)
            self._around = f.Surroundings("cuda", measured, pcie, node, far_share, mps_running())
        else:
            self._around = f.Surroundings("cpu", measured)

    @property
    def link(self) -> float:
        """Bytes a second that were measured; 0 if nothing was."""
        return 0.0 if self._around.measured is None else self._around.measured.link

    def tell(
        self,
        slots: SlotMemory,
        scheduler: Scheduler,
        staging_bytes: int,
        plan_only: bool,
        as_json: bool,
    ) -> None:
        """The plan, to the log, or, if it is all that was asked for, to stdout. ``staging_bytes``: what
        the filler copies ahead of the slots."""
        strategy = scheduler.strategy
        subject = subject_of(slots)
        found = None
        if self._around.measured is not None:
            machine = f.hardware(self._around, staging_bytes, subject)
            spec = strategy.spec or strategy.name
            found = f.forecast(subject, lambda: make_strategy(spec), machine)
        of = (subject, strategy.name, self._around, found)
        told, warnings = plan_text.lines(*of), plan_text.warnings(*of)
        if plan_only:
            told.append(f"beside the slots: {subject.beside or 'nothing'}")
        told += [f"warning: {line}" for line in warnings]
        if not plan_only:
            for line in told:
                log.info("plan: %s", line)
        elif as_json:
            print(json.dumps(plan_text.as_json(*of)), flush=True)
        else:
            print("\n".join(told), flush=True)


def subject_of(slots: SlotMemory) -> f.Subject:
    """What these slots are to serve."""
    store = slots.store
    packed = [weight for weight, kind in enumerate(slots.formats) if kind == PACKED]
    resident = make_strategy("resident")
    formats = slot_formats(store, slots.slots, resident)
    everything = slots.fitting(resident, Cache(), formats, instead=True)
    return f.Subject(
        store=store.path.name,
        plan=slots.plan,
        sizes=slots.sizes,
        traffic=Traffic.of([entry.elements for entry in store.weights], slots.sizes, packed),
        config=store.config,
        capacity=slots.capacity,
        all_fit=everything.capacity.size_bytes >= sum(slots.sizes),
        copies=slots.copies,
        method=store.method,
        quality=store.quality,
        beside=str(slots.footprint),
        draft=_draft_of(slots),
    )


def _draft_of(slots: SlotMemory) -> f.Draft | None:
    draft = slots.draft
    if draft is None:
        return None
    store = draft.store
    return f.Draft(store.path.name, len(store.weights), store.packed_bytes, draft.size_bytes)


def pci_address(memory: CudaMemory) -> str:
    """Such as ``0000:1b:00.0``; "" if the driver does not say."""
    driver = memory.driver
    try:
        device = memory.call(driver.cuDeviceGet, memory.device.index)
        text: bytes = memory.call(driver.cuDeviceGetPCIBusId, 32, device)
    except WeightFeederError:
        return ""
    return text.split(b"\0")[0].decode().lower()
