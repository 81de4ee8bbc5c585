"""A client that also writes down when it waited, which weight was used when, and what was said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import protocol as p
from common.memory import Memory
from common.trace import Args, Tracer, now
from common.trace_device import DeviceSpans
from engine.client import WeightClient
from engine.ledger import Lease

ROWS = ("tokens", "weights", "GPU", "messages")


class TracedClient(WeightClient):
    """Notes each use of a weight, from the call of ``acquire`` to that of ``release``, and the wait in
    it; on CUDA also when the device did it."""

    def __init__(
        self, tracer: Tracer, directory: Path, leash_fd: int | None = None, verify: bool = False
    ) -> None:
        self._tracer = tracer
        self._device: DeviceSpans | None = None
        self._asked_ns = self._acquired_ns = 0
        self._begun: Any = None  # on CUDA: the moment of the stream at which it began with a weight
        super().__init__(directory, leash_fd, verify)

    def use(self, memory: Memory) -> None:
        if memory.device.type == "cuda":
            self._device = DeviceSpans(self._tracer, memory.device)
        super().use(memory)

    def acquire(self, weight: int) -> Lease:
        self._asked_ns = now()
        lease = super().acquire(weight)
        self._begin()
        return lease

    def try_acquire(self, weights: Sequence[int]) -> list[Lease] | None:
        asked_ns = now()
        leases = super().try_acquire(weights)
        if leases is not None:
            self._asked_ns = asked_ns
            self._begin()
        return leases

    def release(self, lease: Lease) -> None:
        """Of several that were acquired together, the first to be released gets all the time."""
        grant = lease.grant
        name = self.names[grant.weight]
        args: Args = {"slot": grant.slot, "generation": grant.generation}
        if self._device is not None:
            begun = self._begun or self._device.mark(self._stream)
            self._device.since(begun, self._stream, "GPU", name, dict(args))
            self._begun = None
        end = now()
        super().release(lease)
        args["acquire_us"] = max(0, self._acquired_ns - self._asked_ns) / 1000
        self._tracer.span("weights", name, self._asked_ns, end, args)
        self._asked_ns = end

    def close(self, reason: str = "done") -> None:
        super().close(reason)
        if self._device is not None:
            self._device.close()
            self._device = None

    def _begin(self) -> None:
        self._acquired_ns = now()
        if self._device is not None:
            self._device.collect()
            self._begun = self._device.mark(self._stream)

    def _wait_for(self, weight: int) -> Lease:
        waits, start = self.stats.waits, now()
        lease = super()._wait_for(weight)
        if self.stats.waits > waits:  # else the grant was there, and had only to be read
            self._tracer.span("weights", "wait", start, now(), {"weight": self.names[weight]})
        return lease

    def _turn(self) -> None:
        super()._turn()
        self._tracer.flush_if_due()

    def _obey(self, message: p.Message) -> None:
        super()._obey(message)
        if isinstance(message, p.Grant):
            args = {"slot": message.slot, "generation": message.generation}
            self._tracer.instant("messages", "grant", now(), args)

    def _returned(self, grants: list[p.Grant]) -> None:
        at = now()
        super()._returned(grants)
        for grant in grants:
            args = {"slot": grant.slot, "generation": grant.generation}
            self._tracer.instant("messages", "release", at, args)


def client_for(tracer: Tracer | None) -> Callable[..., WeightClient]:
    """What makes a client: a plain one, or one that notes what it does."""
    if tracer is None:
        return WeightClient
    return lambda *arguments: TracedClient(tracer, *arguments)
