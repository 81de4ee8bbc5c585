"""The feeder's loop: events in, the scheduler's commands out. Owns every slot; knows no strategy.

One thread, one poll: messages, completed fills, the engine's death, the launcher's death, signals.
Idle, or with its engine stopped in a debugger, it sleeps in that poll and uses no CPU.
"""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch

from common import protocol as p
from common.channel import Poller, Server
from common.config import Cache, format_bytes
from common.errors import MemoryShortageError, PeerError, ProtocolError, WeightFeederError
from common.log import log
from common.memory import Memory, Segment
from common.plan import Capacity, Plan
from common.process import Leash, Lock, SignalFlag, Terminated, watch
from common.slots import Slot
from common.wait import Pending, Wakeup
from feeder.budget import Request, engine_reserve_bytes, slot_sizes
from feeder.filler import Filler
from feeder.host import HostStore
from feeder.scheduler import Fill, Grant, Revoke, Scheduler
from feeder.strategies.base import Strategy
from feeder.strategies.registry import make_strategy
from feeder.verify import Verifier

STATUS_PATIENCE_S = 0.3  # how long a status waits for an engine, which may be stopped
_MALFORMED_SHOWN = 3


@dataclass
class _Engine:
    """The engine that is served."""

    peer: bytes
    pid: int
    watch_fd: int
    segments: set[int]  # that it was told of and has not given up


@dataclass
class _Resize:
    """A change of the arena that waits until every slot is free."""

    peer: bytes
    strategy: Strategy
    cache: Cache
    retiring: bool = False


class Feeder:
    """One feeder. ``run`` serves until it is told to stop."""

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
        verify: bool = False,
    ) -> None:
        self.host, self.memory, self.filler = host, memory, filler
        self.dtype, self.cache = dtype, cache
        self._verifier = Verifier(host, dtype) if verify else None
        self._directory = directory
        store = host.store
        self._sizes = slot_sizes(store, dtype)
        self._plan = Plan(tuple(range(len(store.weights))))
        capacity = self._capacity(strategy, cache)
        self._segment_id = 0
        self._segment: Segment = memory.allocate(capacity.size_bytes)
        self.scheduler = Scheduler(
            self._plan, self._sizes, capacity, strategy,
            first_generation=int.from_bytes(os.urandom(4), "big"), on_fallback=log.error,
            on_evict=self._evicted if verify else None,
        )  # fmt: skip
        self._wakeup = wakeup
        self._signal = SignalFlag(wakeup)
        self._fills: Pending[int] = Pending()
        self._server = Server(directory / "feeder.sock")
        self._engine: _Engine | None = None
        self._resize: _Resize | None = None
        self._asking: list[tuple[bytes, float]] = []  # who waits for a status, and until when
        self._malformed = 0
        self._stopping = ""
        self._samples: deque[tuple[float, int]] = deque(maxlen=512)  # (clock, streamed bytes)

    # The loop ----------------------------------------------------------------------------------

    def run(self, leash: Leash) -> None:
        """Serve until Stop, a signal or the launcher's end. Raises what ended it, if unasked."""
        poller = Poller()
        self._poller = poller
        self._server.register(poller)
        poller.add(self._wakeup.fd)
        if leash.fd is not None:
            poller.add(leash.fd)
        self._execute()
        while not self._stopping:
            ready = poller.wait(self._patience())
            self._wakeup.clear()
            if self._signal.received:
                raise Terminated(self._signal.received)
            if leash.fd in ready:
                raise PeerError("the launcher is gone")
            for slot in self._fills.done():
                self._filled(slot)
            for peer, message in self._server.receive():
                self._handle(peer, message)
            if self._engine is not None and self._engine.watch_fd in ready:
                log.info("engine %d has ended; its slots are ready again", self._engine.pid)
                self._forget_engine()
            self._answer_overdue()
            self._execute()
        log.info("stopping: %s", self._stopping)

    def close(self) -> None:
        """Say goodbye, finish what is on its way, give everything back."""
        if self._engine is not None:
            self._send(p.Goodbye(self._stopping or "the feeder ends"))
            self._forget_engine()
        self._server.close()
        self.filler.close()
        self._segment.close()

    def _patience(self) -> float | None:
        if len(self._fills) and self.memory.device.type == "cuda":
            return 0.0  # nothing wakes a poll when an event fires; see common/wait.py
        if not self._asking:
            return None
        return max(0.0, min(until for _, until in self._asking) - time.monotonic()) + 0.001

    def _execute(self) -> None:
        """Carry out what the scheduler decides now."""
        for command in self.scheduler.step():
            match command:
                case Fill(slot, weight, offset):
                    self._fill(slot, weight, offset)
                case Grant():
                    self._grant(command)
                case Revoke(slot, generation):
                    self._send(p.Revoke(slot, generation))
        if self._resize is not None and self.scheduler.drained:
            self._continue_resize(self._resize)

    def _fill(self, slot: int, weight: int, offset: int) -> None:
        flat = self._data(weight, offset)
        self._fills.add(self.filler.start(weight, flat.view(self.dtype)), slot)

    def _data(self, weight: int, offset: int) -> torch.Tensor:
        size_bytes = self.host.store.weights[weight].elements * self.dtype.itemsize
        return self._segment.tensor[offset:][:size_bytes]

    def _check(self, slot_id: int, moment: str) -> int:
        """In verify mode: the slot's checksum, which has been compared with what it must be."""
        if self._verifier is None:
            return 0
        slot = self.scheduler.slots.by_id(slot_id)
        return self._verifier.check(slot, self._data(slot.weight, slot.offset_bytes), moment)

    def _evicted(self, slot: Slot) -> None:
        assert self._verifier is not None
        self._verifier.freed(self._data(slot.weight, slot.offset_bytes))

    def _filled(self, slot: int) -> None:
        self._check(slot, "fill")
        self.scheduler.filled(slot)
        self._samples.append((time.monotonic(), self.filler.streamed_bytes))

    def _grant(self, grant: Grant) -> None:
        entry = self.host.store.weights[grant.weight]
        self._send(
            p.Grant(
                weight=grant.weight, slot=grant.slot, generation=grant.generation,
                segment=self._segment_id, offset_bytes=grant.offset_bytes,
                size_bytes=entry.elements * self.dtype.itemsize, format="dequantized",
                standing=grant.standing, checksum=self._check(grant.slot, "grant"),
            )
        )  # fmt: skip

    # Messages ----------------------------------------------------------------------------------

    def _handle(self, peer: bytes, message: p.Message | ProtocolError) -> None:
        if isinstance(message, ProtocolError):
            self._malformed += 1
            if self._malformed <= _MALFORMED_SHOWN:
                log.warning("refused a message: %s", message)
            self._server.send(peer, p.Failure("protocol", str(message)))
            return
        from_engine = self._engine is not None and peer == self._engine.peer
        match message:
            case p.Hello():
                self._hello(peer, message)
            case p.StatusRequest() if from_engine:
                self._server.send(peer, p.Status(self._fields()))
            case p.StatusRequest():
                self._ask_engine(peer)
            case p.Swap():
                self._swap(peer, message)
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
        scheduler = self.scheduler
        match message:
            case p.Need(weight) if weight < len(self._sizes):
                scheduler.need(weight)
            case p.Release(slots, generations):
                for slot, generation in zip(slots, generations, strict=True):
                    if scheduler.slots.held(slot, generation) is not None:
                        self._check(slot, "release")
                    scheduler.released(slot, generation)
            case p.Plan(weights) if self._is_plan(weights):
                scheduler.set_plan(Plan(weights))
            case p.Retired(segment):
                if self._engine is not None:
                    self._engine.segments.discard(segment)
            case p.Status(fields):
                for peer, _ in self._asking:
                    engine = {f"engine_{name}": value for name, value in fields.items()}
                    self._server.send(peer, p.Status(self._fields() | engine))
                self._asking.clear()
            case p.Goodbye(reason):
                log.info("engine %d leaves: %s", self._engine.pid if self._engine else 0, reason)
                self._forget_engine()
            case p.Failure(code, text):
                log.error("the engine reports %s: %s", code, text)
            case _:
                scheduler.counters.ignored += 1
                text = f"{type(message).__name__} names what this store does not have"
                self._send(p.Failure("protocol", text))

    def _is_plan(self, weights: p.Numbers) -> bool:
        total = len(self._sizes)
        return 0 < len(weights) == len(set(weights)) and all(w < total for w in weights)

    def _hello(self, peer: bytes, hello: p.Hello) -> None:
        store = self.host.store
        if hello.role != "engine":
            text = f"role {hello.role!r} found: expected engine (others need no hello)"
            self._server.send(peer, p.Failure("role", text))
            return
        if self._engine is not None:
            text = (
                f"this feeder serves the engine with pid {self._engine.pid} already:"
                " end that one, or start a feeder with another --name"
            )
            self._server.send(peer, p.Failure("busy", text))
            return
        if hello.fingerprint not in ("", store.fingerprint):
            text = (
                f"this feeder has store {store.fingerprint} ({store.path}),"
                f" the engine works with {hello.fingerprint}"
            )
            self._server.send(peer, p.Failure("store", text))
            return
        try:
            self._engine = _Engine(peer, hello.pid, watch(hello.pid), set())
        except PeerError as error:
            self._server.send(peer, p.Failure("pid", str(error)))
            return
        self._poller.add(self._engine.watch_fd)
        log.info("engine %d is here", hello.pid)
        self._send(
            p.Welcome(
                pid=os.getpid(), store=str(store.path), fingerprint=store.fingerprint,
                dtype=str(self.dtype).removeprefix("torch."), device=self.memory.identity,
                strategy=self.scheduler.strategy.name, cache=str(self.cache), verify=self._verifier is not None,
            )
        )  # fmt: skip
        if self._resize is None:
            self._export()
        self.scheduler.attach()

    def _export(self) -> None:
        if self._engine is None:
            return
        self._engine.segments.add(self._segment_id)
        segment = self._segment
        self._send(p.Export(self._segment_id, segment.kind, segment.size_bytes, segment.handle))

    def _send(self, message: p.Message) -> None:
        """To the engine. If it cannot be sent, the engine is dying: its pidfd will say so."""
        if self._engine is not None and not self._server.send(self._engine.peer, message):
            log.debug("not sent: %s", message)

    def _forget_engine(self) -> None:
        if self._engine is None:
            return
        self._poller.remove(self._engine.watch_fd)
        os.close(self._engine.watch_fd)
        self._engine = None
        self.scheduler.detach()

    # Requests ----------------------------------------------------------------------------------

    def _swap(self, peer: bytes, swap: p.Swap) -> None:
        try:
            if self._resize is not None:
                raise WeightFeederError("a swap is under way: try again when it is done")
            now = self.scheduler.strategy
            cache = Cache.parse(swap.cache) if swap.cache else self.cache
            strategy = make_strategy(swap.strategy or now.spec or now.name)
            capacity = self._capacity(strategy, cache, own=self._segment.size_bytes)
        except WeightFeederError as error:
            self._server.send(peer, p.Failure("swap", str(error)))
            return
        has = self.scheduler.capacity
        if capacity.count == has.count and capacity.size_bytes <= has.size_bytes and not swap.cache:
            self.scheduler.set_strategy(strategy)
            self._swapped(peer)
            return
        self._resize = _Resize(peer, strategy, cache)
        self.scheduler.drain()

    def _continue_resize(self, resize: _Resize) -> None:
        """Every slot is free: the old segment goes (the engine unmaps it first), a new one comes."""
        if self._engine is not None and self._segment_id in self._engine.segments:
            if not resize.retiring:
                resize.retiring = True
                self._send(p.Retire(self._segment_id))
            return
        self._resize = None
        former, refused = self.scheduler.capacity, ""
        self._segment.close()
        try:
            capacity = self._capacity(resize.strategy, resize.cache)
            self._segment = self.memory.allocate(capacity.size_bytes)
            self.cache = resize.cache
        except MemoryShortageError as error:
            capacity, refused = former, f"{error}: the cache stays as it was"
            self._segment = self.memory.allocate(capacity.size_bytes)
        self._segment_id += 1
        self.scheduler.resize(capacity, resize.strategy)
        self._export()
        if refused:
            self._server.send(resize.peer, p.Failure("memory", refused))
        else:
            self._swapped(resize.peer)
        self._execute()

    def _swapped(self, peer: bytes) -> None:
        capacity = self.scheduler.capacity
        text = (
            f"strategy {self.scheduler.strategy.name}, {capacity.count} weights in"
            f" {format_bytes(capacity.size_bytes)} of slots"
        )
        log.info("swapped: %s", text)
        self._server.send(peer, p.Done(text))

    def _capacity(self, strategy: Strategy, cache: Cache, own: int = 0) -> Capacity:
        """What the cache comes to on this device now. ``own``: bytes that would be given up for it."""
        store = self.host.store
        engine_runs = Lock.holder(self._directory / "engine.lock") is not None
        reserve = engine_reserve_bytes(store, self.memory.device, engine_runs)
        request = Request(self._plan, self._sizes, [w.name for w in store.weights], cache)
        capacity, cut = request.capacity(strategy, self.memory.free_bytes() + own - reserve)
        if cut and not own:
            log.warning("%s", cut)
        return capacity

    def _ask_engine(self, peer: bytes) -> None:
        if self._engine is None:
            self._server.send(peer, p.Status(self._fields()))
            return
        if not self._asking:
            self._send(p.StatusRequest())
        self._asking.append((peer, time.monotonic() + STATUS_PATIENCE_S))

    def _answer_overdue(self) -> None:
        now = time.monotonic()
        for peer, until in self._asking:
            if until <= now or self._engine is None:
                self._server.send(peer, p.Status(self._fields()))
        self._asking = [a for a in self._asking if a[1] > now and self._engine is not None]

    def _fields(self) -> p.Fields:
        scheduler, counters = self.scheduler, self.scheduler.counters
        states = dict.fromkeys(("filling", "ready", "in_use", "revoked"), 0)
        for slot in scheduler.slots:
            states[slot.state.value] += 1
        return {
            "pid": os.getpid(),
            "store": str(self.host.store.path),
            "fingerprint": self.host.store.fingerprint,
            "packed_bytes": self.host.store.packed_bytes,
            "weights": len(self._sizes),
            "device": self.memory.identity,
            "dtype": str(self.dtype).removeprefix("torch."),
            "strategy": scheduler.strategy.name,
            "cache": str(self.cache),
            "slots": scheduler.capacity.count,
            "arena_bytes": scheduler.capacity.size_bytes,
            **{f"slots_{state}": count for state, count in states.items()},
            "standing": sum(slot.standing for slot in scheduler.slots),
            "full": scheduler.full,
            "hit_rate": scheduler.hit_rate,
            "passes": counters.passes,
            "fills": counters.fills,
            "grants": counters.grants,
            "revokes": counters.revokes,
            "ignored": counters.ignored,
            "malformed": self._malformed,
            "streamed_bytes": self.filler.streamed_bytes,
            "link_bytes_per_s": self._link_rate(),
            "peak_bytes": self.memory.peak_bytes(),
            "engine_pid": self._engine.pid if self._engine else 0,
        }

    def _link_rate(self) -> float:
        """Bytes a second over the last second of streaming; 0 if nothing was streamed in it."""
        since = time.monotonic() - 1.0
        recent = [sample for sample in self._samples if sample[0] >= since]
        if len(recent) < 2 or recent[-1][0] == recent[0][0]:
            return 0.0
        return (recent[-1][1] - recent[0][1]) / (recent[-1][0] - recent[0][0])
