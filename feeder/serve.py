"""The feeder's loop: events in, the scheduler's commands out. Owns every slot; knows no strategy.

One thread, one poll: messages, completed fills, the engine's death, the launcher's death, signals.
Idle, or with its engine stopped in a debugger, it sleeps in that poll and uses no CPU.
"""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from common import protocol as p
from common.channel import Poller, Server
from common.config import Cache
from common.errors import PeerError, ProtocolError
from common.formats import PACKED
from common.log import log
from common.memory import Memory
from common.plan import Plan
from common.process import Leash, SignalFlag, Terminated, watch
from common.slots import Slot
from common.wait import Pending, Wakeup
from feeder.draft_memory import DraftMemory
from feeder.filler import Filler
from feeder.footprint import Limits
from feeder.host import HostStore
from feeder.requests import StatusRequests, SwapRequests
from feeder.scheduler import Fill, Grant, Revoke, Scheduler
from feeder.slot_memory import SlotMemory
from feeder.status import LinkMeter, status_fields
from feeder.strategies.base import Strategy
from feeder.verify import Verifier

UNSENT_PATIENCE_S = 0.1
#: While device work is awaited the loop does not sleep, and looks after descriptors only so often: that
#: takes several calls of the system, messages and events hardly any.
LOOK_S = 0.001
#: So long after the last event it does not sleep either: the engine's next release is near, and to be
#: woken takes as long as a fill.
LINGER_S = 0.0005
GRANTS_TOGETHER = 1024  # in one message, far below what one may carry
_MALFORMED_SHOWN = 3


@dataclass
class _Engine:
    """The engine that is served. ``mapped``: it was told of the segment, and has not given it up."""

    peer: bytes
    pid: int
    watch_fd: int
    mapped: bool = False


class Feeder:
    """One feeder. ``run`` serves until it is told to stop; ``close`` gives everything back."""

    def __init__(
        self,
        host: HostStore,
        memory: Memory,
        filler: Filler,
        wakeup: Wakeup,
        directory: Path,
        dtype: torch.dtype,
        cache: Cache,
        strategy: Strategy,
        slots: str,
        verify: bool = False,
        limits: Limits | None = None,
        draft: DraftMemory | None = None,
    ) -> None:
        """``wakeup``: what ``filler`` wakes the loop by; ``directory``: where the socket goes;
        ``draft``: lent beside the slots, and closed with them."""
        self.slots = SlotMemory(
            host.store, memory, dtype, directory, cache, strategy, slots, filler, limits, draft
        )
        self.scheduler = Scheduler(
            self.slots.plan, self.slots.sizes, self.slots.capacity, strategy,
            first_generation=int.from_bytes(os.urandom(4), "big"), on_fallback=log.error,
            on_evict=self._evicted if verify else None, copies=self.slots.copies,
            link_bytes=filler.link_bytes,
        )  # fmt: skip
        self._store, self._memory, self._filler = host.store, memory, filler
        self._verifier = Verifier(host, self.slots) if verify else None
        self._wakeup, self._signal = wakeup, SignalFlag(wakeup)
        self._fills: Pending[int] = Pending()
        self._meter = LinkMeter()
        self._server = Server(directory / "feeder.sock")
        self._poller = Poller()
        self._status = StatusRequests(self._server.send, self._fields)
        self._swap = SwapRequests(self._server.send, self.scheduler, self.slots)
        self._engine: _Engine | None = None
        self._unsent: deque[p.Message] = deque()
        self._grants: list[p.Grant] = []  # to be sent
        self._malformed = 0
        self._on_gpu = memory.device.type == "cuda"
        self._look_at = self._changed_at = 0.0
        self._stopping = ""
        self.link_limit = 0.0  # bytes a second, where somebody has measured it

    @property
    def staging_bytes(self) -> int:
        """Device memory that fills pass through."""
        return self._filler.staging_bytes

    # The loop ----------------------------------------------------------------------------------

    def run(self, leash: Leash) -> None:
        """Serve until Stop, a signal or the launcher's end. Raises what ended it, if unasked."""
        self._server.register(self._poller)
        self._poller.add(self._wakeup.fd)
        if leash.fd is not None:
            self._poller.add(leash.fd)
        self._execute()
        while not self._stopping:
            ready = self._wait()
            if self._signal.received:
                raise Terminated(self._signal.received)
            if leash.fd in ready:
                raise PeerError("the launcher is gone")
            changed = False  # while fills are asked after, most turns bring nothing
            if self._engine is not None and self._engine.watch_fd in ready:
                log.info("engine %d has ended; its slots are ready again", self._engine.pid)
                self._forget_engine()
                changed = True
            for slot in self._fills.done():
                self._filled(slot)
                changed = True
            for peer, message in self._server.receive():
                self._handle(peer, message)
                changed = True
            self._status.overdue(everyone=self._engine is None)
            self._send_again()
            if changed:
                self._execute()
                self._changed_at = time.monotonic()
        log.info("stopping: %s", self._stopping)

    def close(self) -> None:
        """Say goodbye, finish what is on its way, give everything back."""
        served, draft = self._engine is not None, self.slots.draft
        mapped = self._engine is not None and self._engine.mapped
        if self._engine is not None:
            self._send(p.Goodbye(self._stopping or "the feeder ends"))
            self._forget_engine()
        self._server.close()
        self._filler.close()
        if not mapped:  # else its kernels may be reading: the end of this process frees the memory
            self.slots.close()
        if draft is not None and not served:
            draft.close()

    def _wait(self) -> set[int]:
        """Until something may have happened; the descriptors that are readable, and were looked at."""
        patience, now = self._patience_s(), time.monotonic()
        if patience == 0.0 and now < self._look_at:
            return set()
        self._look_at = now + LOOK_S
        ready = self._poller.wait(patience)
        self._wakeup.clear()
        return ready

    def _patience_s(self) -> float | None:
        if self._on_gpu and (len(self._fills) or time.monotonic() < self._changed_at + LINGER_S):
            return 0.0  # nothing wakes a poll when an event fires; see common/wait.py
        if self._unsent:
            return UNSENT_PATIENCE_S
        return self._status.patience_s()

    def _execute(self) -> None:
        """Carry out what the scheduler decides now."""
        fills: list[Fill] = []
        for command in self.scheduler.step():
            match command:
                case Fill():
                    fills.append(command)
                case Grant():
                    self._grant(command)
                case Revoke(slot, generation):
                    self._send_grants()  # of which it may be one
                    self._send(p.Revoke(slot, generation))
        self._send_grants()  # first, since the engine may wait for them
        for fill in fills:
            self._fill(fill)
        mapped = self._engine is not None and self._engine.mapped
        if self._swap.go_on(mapped, lambda: self._send(p.Retire(self.slots.segment_id))):
            self._export()
            self._execute()
        if (ahead := self._filler.ahead_bytes) and not self._filler.far <= self.scheduler.kept:
            upcoming = self.scheduler.upcoming(ahead, self._filler.link_bytes)
            formats = self.slots.formats
            self._filler.prefetch([weight for weight in upcoming if formats[weight] != PACKED])

    def _fill(self, fill: Fill) -> None:
        kind = self.slots.formats[fill.weight]
        data = self.slots.destination(fill.weight, fill.offset_bytes)
        self._fills.add(self._filler.start(fill.weight, kind, data), fill.slot)

    def _filled(self, slot: int) -> None:
        self._check(slot, "fill")
        self.scheduler.filled(slot)
        self._meter.add(self._filler.streamed_bytes)

    def _grant(self, grant: Grant) -> None:
        self._grants.append(
            p.Grant(
                weight=grant.weight, slot=grant.slot, generation=grant.generation,
                segment=self.slots.segment_id, offset_bytes=grant.offset_bytes,
                size_bytes=self.slots.weight_bytes(grant.weight), format=self.slots.formats[grant.weight],
                standing=grant.standing, checksum=self._check(grant.slot, "grant"),
            )
        )  # fmt: skip

    def _send_grants(self) -> None:
        """In order, and those that follow each other and are alike in one message."""
        grants, self._grants = self._grants, []
        for _, alike in groupby(grants, lambda grant: (grant.format, grant.standing)):
            several = list(alike)
            for first in range(0, len(several), GRANTS_TOGETHER):
                some = several[first : first + GRANTS_TOGETHER]
                self._send(some[0] if len(some) == 1 else p.Grants.of(some))

    def _check(self, slot_id: int, moment: str) -> int:
        """In verify mode: the slot's checksum, which has been compared with what it must be."""
        if self._verifier is None:
            return 0
        slot = self.scheduler.slots.by_id(slot_id)
        data = self.slots.data(slot.weight, slot.offset_bytes)
        return self._verifier.check(slot, data, moment)

    def _evicted(self, slot: Slot) -> None:
        assert self._verifier is not None
        self._verifier.freed(self.slots.data(slot.weight, slot.offset_bytes))

    def _fields(self) -> p.Fields:
        return status_fields(
            self.slots, self.scheduler, self._filler, self._meter, self.link_limit
        ) | {
            "malformed": self._malformed,
            "engine_pid": self._engine.pid if self._engine else 0,
        }

    # Messages ----------------------------------------------------------------------------------

    def _handle(self, peer: bytes, message: p.Message | ProtocolError) -> None:
        from_engine = self._engine is not None and peer == self._engine.peer
        match message:
            case ProtocolError():
                self._malformed += 1
                if self._malformed <= _MALFORMED_SHOWN:
                    log.warning("refused a message: %s", message)
                self._server.send(peer, p.Failure("protocol", str(message)))
            case p.Hello():
                if not from_engine:  # else it asked again before it had its answer
                    self._hello(peer, message)
            case p.StatusRequest() if from_engine:
                self._server.send(peer, p.Status(self._fields()))
            case p.StatusRequest():
                ask_engine = None if self._engine is None else lambda: self._send(message)
                self._status.ask(peer, ask_engine)
            case p.Swap():
                self._swap.ask(peer, message)
            case p.Stop():
                self._stopping = "asked to"
                self._server.send(peer, p.Done("the feeder ends"))
            case p.Goodbye() if not from_engine:
                pass
            case _ if from_engine:
                self._from_engine(message)
            case _:
                self.scheduler.counters.ignored += 1
                kind = type(message).__name__
                text = f"{kind} from a peer that is not the engine: say hello first"
                self._server.send(peer, p.Failure("unknown-peer", text))

    def _from_engine(self, message: p.Message) -> None:
        assert self._engine is not None
        scheduler = self.scheduler
        match message:
            case p.Need(weight) if weight < len(scheduler.sizes):
                scheduler.need(weight)
            case p.Release(slots, generations):
                for slot, generation in zip(slots, generations, strict=True):
                    if self._verifier and scheduler.slots.held(slot, generation) is not None:
                        self._check(slot, "release")
                    scheduler.released(slot, generation)
            case p.Plan(weights) if self._is_plan(weights):
                scheduler.set_plan(Plan(weights))
            case p.Retired(segment):
                if segment == self.slots.segment_id:
                    self._engine.mapped = False
            case p.Status(fields):
                self._status.answered(fields)
            case p.Shrink(size_bytes):
                self._swap.shrink(size_bytes, self._shrunk)
            case p.Goodbye(reason):
                log.info("engine %d leaves: %s", self._engine.pid, reason)
                self._forget_engine()
            case p.Failure(code, text):
                log.error("the engine reports %s: %s", code, text)
            case _:
                scheduler.counters.ignored += 1
                text = f"{type(message).__name__} names what this store does not have"
                self._send(p.Failure("protocol", text))

    def _is_plan(self, weights: p.Numbers) -> bool:
        total = len(self.scheduler.sizes)
        return 0 < len(weights) == len(set(weights)) and all(w < total for w in weights)

    # The engine --------------------------------------------------------------------------------

    def _hello(self, peer: bytes, hello: p.Hello) -> None:
        refusal = self._refusal(hello)
        if refusal is not None:
            self._server.send(peer, refusal)
            return
        try:
            self._engine = _Engine(peer, hello.pid, watch(hello.pid))
        except PeerError as error:
            self._server.send(peer, p.Failure("pid", str(error)))
            return
        self._poller.add(self._engine.watch_fd)
        draft = self.slots.draft
        log.info("engine %d is here", hello.pid)
        self._send(
            p.Welcome(
                pid=os.getpid(), store=str(self._store.path), fingerprint=self._store.fingerprint,
                dtype=str(self.slots.dtype).removeprefix("torch."), device=self._memory.identity,
                strategy=self.scheduler.strategy.name, cache=str(self.slots.cache),
                verify=self._verifier is not None, engine_bytes=self.slots.engine_bytes,
                weights=len(self._store.weights), draft=str(draft.store.path) if draft else "",
                draft_fingerprint=draft.store.fingerprint if draft else "",
            )
        )  # fmt: skip
        for message in draft.messages(self.slots.engine_bytes) if draft else ():
            self._send(message)
        if not self._swap.waiting:
            self._export()
        self.scheduler.attach()

    def _refusal(self, hello: p.Hello) -> p.Failure | None:
        store = self._store
        if hello.role != "engine":
            text = f"role {hello.role!r} found: expected engine (others need no hello)"
            return p.Failure("role", text)
        if self._engine is not None:
            text = (
                f"this feeder serves the engine with pid {self._engine.pid} already:"
                " end that one, or start a feeder with another --name"
            )
            return p.Failure("busy", text)
        lacking = set(self.slots.formats) - set(hello.formats.split(","))
        if lacking:
            text = (
                f"the engine reads slots of {hello.formats!r}, this feeder fills {lacking.pop()!r}:"
                " start the feeder with --slots dequantized"
            )
            return p.Failure("formats", text)
        if hello.fingerprint not in ("", store.fingerprint):
            text = (
                f"this feeder has store {store.fingerprint} ({store.path}),"
                f" the engine works with {hello.fingerprint}"
            )
            return p.Failure("store", text)
        return None

    def _shrunk(self, size_bytes: int) -> None:
        self._send(p.Shrunk(size_bytes, self.slots.engine_bytes))

    def _export(self) -> None:
        if self._engine is not None:
            self._engine.mapped = True
            self._send(self.slots.export())

    def _send(self, message: p.Message) -> None:
        """To the engine, in order. What cannot be sent now, to one that is stopped or dying, waits."""
        if self._engine is None:
            return
        if self._unsent or not self._server.send(self._engine.peer, message):
            self._unsent.append(message)

    def _send_again(self) -> None:
        while self._unsent and self._engine is not None:
            if not self._server.send(self._engine.peer, self._unsent[0]):
                return
            self._unsent.popleft()

    def _forget_engine(self) -> None:
        if self._engine is not None:
            self._poller.remove(self._engine.watch_fd)
            os.close(self._engine.watch_fd)
            self._engine = None
            self._unsent.clear()
            self._swap.forget_engine()
            self.scheduler.detach()
