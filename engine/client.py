"""The engine's end of the protocol: ``acquire`` blocks until a weight is granted, ``release`` returns it.

The main thread does the talking itself: it takes grants from the socket when it needs one, and returns
slots when the kernels that read them are complete, at its next ``acquire``. A second thread looks in
now and then, for the times when the main thread computes, samples or sits in a debugger: it returns
what was revoked, answers questions, and notices that the feeder is gone. One lock guards everything,
the socket too. Two threads that shared the work of each weight spent most of the time handing each
other Python's interpreter lock: docs/decisions/0002-one-thread.md.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import protocol as p
from common.channel import Client, Poller
from common.errors import PeerError, ProtocolError, SlotCorruptError, WeightFeederError
from common.log import log
from common.memory import Memory
from common.process import Lock, watch
from common.verify import slot_checksum
from common.wait import Pending
from engine.ledger import Lease, Ledger

HELLO_INTERVAL_S = 0.1
HELLO_REPEAT_S = 1.0
KEEPER_INTERVAL_S = 0.05  # how often the second thread looks in
DYING_S = 5.0  # how long a killed process may take to end
SPIN_S = 0.005  # how long a blocked acquire asks without sleeping whether kernels are complete
_FORMATS = "dequantized"
_MALFORMED_SHOWN = 3


@dataclass
class Stats:
    """What the engine has done and how long it waited. ``stall_s``: blocked on grants."""

    uses: int = 0
    waits: int = 0
    stall_s: float = 0.0
    lost_feeders: int = 0
    malformed: int = 0
    ignored: int = 0


class WeightClient:
    """One engine's line to whatever feeder has the run directory. Close it to return everything."""

    def __init__(self, directory: Path, leash_fd: int | None = None, verify: bool = False) -> None:
        """``leash_fd``: readable when the launcher is gone. ``verify``: check every slot's bytes
        when it is taken and before it is returned, which is slow."""
        self._directory, self._leash_fd, self._verify = directory, leash_fd, verify
        self.stats = Stats()
        self.feeder: p.Welcome | None = None  # the one we talk to now
        self._lock = threading.RLock()
        self._ledger = Ledger()
        self._pending: Pending[Lease] = Pending()  # released, their kernels still run
        self._idle: list[Lease] = []  # released and complete, the feeder to be told
        self._needed: int | None = None  # the weight that the main thread is blocked on
        self._early: list[p.Message] = []  # came before there was a memory to map segments in
        self._order: dict[int, None] | None = {}  # the plan as it is learned; None once it is
        self._plan: p.Plan | None = None
        self._fingerprint = ""
        self._memory: Memory | None = None
        self._stream: Any = None
        self._failure: WeightFeederError | None = None
        self._status: p.Fields | None = None
        self._said = ""
        self._refused_pid = 0
        self._watch_fd = -1
        self._ready: set[int] = set()  # descriptors that the last poll found readable
        self._closing = threading.Event()
        self._open()
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._keeper.start()

    # The main thread's calls -------------------------------------------------------------------

    def wait_for_feeder(self) -> p.Welcome:
        """Blocks until a feeder has answered."""
        with self._lock:
            self._pump_until(lambda: self.feeder is not None)
            assert self.feeder is not None
            return self.feeder

    def use(self, memory: Memory) -> None:
        """From now on segments are mapped in ``memory``; kernels run on the current stream."""
        with self._lock:
            self._memory = memory
            self._stream = memory.stream()
            for message in self._early:
                self._obey(message)
            self._early.clear()

    def acquire(self, weight: int) -> Lease:
        """The lease of ``weight``; blocks until the feeder has granted it."""
        with self._lock:
            if self._pending or self._idle:
                self._return_complete()
            lease = self._ledger.take(weight) or self._wait_for(weight)
            self.stats.uses += 1
            if self._order is not None:
                self._learn(weight)
            if self._verify:
                self._check(lease, "grant")
            return lease

    def release(self, lease: Lease) -> None:
        """The work queued so far is the last that reads the lease."""
        with self._lock:
            if self._verify:
                self._check(lease, "release")
            if self._ledger.put(lease):
                self._give_back(lease)

    def ask_status(self, timeout_s: float = 2.0) -> p.Fields:
        """The feeder's own figures; empty if it does not answer in time."""
        with self._lock:
            self._status = None
            self._send(p.StatusRequest())
            self._pump_until(lambda: self._status is not None, timeout_s)
            return self._status or {}

    def peak_bytes(self) -> int:
        """The most device memory that this process has had, mapped slots not counted."""
        return self._memory.peak_bytes() if self._memory else 0

    def close(self, reason: str = "done") -> None:
        """Return everything and say goodbye. The kernels that read slots must be complete."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._keeper.join()
        with self._lock:
            if self.feeder is not None:
                self._return_complete()
                self._send(p.Goodbye(reason))
                # LINGER is 0: give the goodbye a moment to leave. If it does not, our end says it.
                time.sleep(0.02)
            self._ledger.close()
            self._shut()

    def _wait_for(self, weight: int) -> Lease:
        start = time.perf_counter()
        taken: list[Lease] = []

        def granted() -> bool:
            lease = self._ledger.take(weight)
            if lease is not None:
                taken.append(lease)
            return lease is not None

        self._receive()  # it may have been granted long ago, and only be unread
        if granted():
            return taken[0]
        self._needed = weight
        try:
            if self._ledger.returning(weight):  # a need must not overtake the release of its weight
                self._pump_until(lambda: granted() or not self._ledger.returning(weight))
            if not taken:
                self._send(p.Need(weight))
                self._pump_until(granted)
        finally:
            self._needed = None
            self.stats.waits += 1
            self.stats.stall_s += time.perf_counter() - start
        return taken[0]

    def _check(self, lease: Lease, moment: str) -> None:
        found, grant = slot_checksum(lease.data), lease.grant
        expected = grant.checksum or lease.checksum or found  # a feeder without --verify sends none
        lease.checksum = found
        if found != expected:
            raise SlotCorruptError(
                f"verify at {moment}: weight {grant.weight} in slot {grant.slot}, generation"
                f" {grant.generation}, has checksum {found:x}, expected {expected:x}: the slot was"
                " written to while it was granted"
            )

    def _learn(self, weight: int) -> None:
        assert self._order is not None
        if weight not in self._order:
            self._order[weight] = None
            return
        self._plan = p.Plan(tuple(self._order))
        self._order = None
        self._send(self._plan)

    def _give_back(self, lease: Lease) -> None:
        """Nothing more will be queued that reads the lease."""
        work = self._memory.mark(self._stream) if self._memory else None
        if work is None:
            self._idle.append(lease)
            self._return_complete()
        else:
            self._pending.add(work, lease)

    # The pump ----------------------------------------------------------------------------------

    def _pump_until(self, true: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Talk to the feeder until ``true()``, or the time is up. Holds the lock throughout.

        Raises what went wrong, also in the keeper.
        """
        start = time.monotonic()
        while True:
            self._turn()
            if true():
                return
            waited = time.monotonic() - start
            if timeout_s is not None and waited >= timeout_s:
                return
            if self._failure is not None:
                raise self._failure
            if len(self._pending):
                patience = 0.0 if waited < SPIN_S else 0.001
            else:
                patience = 0.5 if self.feeder else HELLO_INTERVAL_S
            if timeout_s is not None:
                patience = min(patience, timeout_s - waited)
            self._ready = self._poller.wait(patience)

    def _keep(self) -> None:
        """The second thread: a turn now and then, unless the main thread is at it."""
        try:
            while not self._closing.wait(KEEPER_INTERVAL_S):
                if self._lock.acquire(blocking=False):
                    try:
                        self._ready = self._poller.wait(0)
                        self._turn()
                    finally:
                        self._lock.release()
        except WeightFeederError as error:
            self._failure = error
        except Exception as error:
            self._failure = PeerError(f"the engine's client: {error!r}")
            raise

    def _turn(self) -> None:
        """Everything that can be done now, without blocking."""
        ready, self._ready = self._ready, set()
        if self._leash_fd in ready:
            self._orphaned()
        self._receive()
        if self._watch_fd in ready:
            self._lost("has ended")
        if self.feeder is None:
            self._hello()
        self._return_complete()

    def _receive(self) -> None:
        channel = self._channel
        for message in channel.receive():
            self._handle(message)
            if channel is not self._channel:
                return  # that feeder is lost, and its socket closed

    def _return_complete(self) -> None:
        """Tell the feeder what the kernels are done with; unmap what nothing reads any more."""
        done = self._pending.done()
        if self._idle:
            done += self._idle
            self._idle = []
        if done:
            told = [lease.grant for lease in done if self._ledger.returned(lease)]
            if told:
                slots = tuple(grant.slot for grant in told)
                self._send(p.Release(slots, tuple(grant.generation for grant in told)))
        for segment in self._ledger.unmap_idle():
            self._send(p.Retired(segment))

    def _send(self, message: p.Message) -> None:
        if self.feeder is not None:
            self._channel.send(message)

    def _open(self) -> None:
        """A socket for the next feeder: a new one, so that nothing meant for the last one reaches it."""
        self._channel = Client(self._directory / "feeder.sock")
        self._poller = Poller()
        self._channel.register(self._poller)
        if self._leash_fd is not None:
            self._poller.add(self._leash_fd)
        self._next_hello = 0.0
        self._ready = set()

    def _shut(self) -> None:
        self._channel.close()
        if self._watch_fd >= 0:
            os.close(self._watch_fd)
            self._watch_fd = -1

    def _orphaned(self) -> None:
        assert self._leash_fd is not None
        log.error("the launcher is gone")
        self._poller.remove(self._leash_fd)
        self._leash_fd = None
        os.kill(os.getpid(), signal.SIGTERM)

    def _hello(self) -> None:
        now = time.monotonic()
        if now < self._next_hello:
            return
        self._next_hello = now + HELLO_INTERVAL_S
        pid = Lock.holder(self._directory / "feeder.lock")
        if pid is not None and pid == self._refused_pid:
            return
        if self._channel.send(p.Hello("engine", os.getpid(), self._fingerprint, _FORMATS)):
            self._next_hello = now + HELLO_REPEAT_S
            return
        name = self._directory.name
        if pid is not None:
            self._say(f"waiting for feeder {name!r}, pid {pid}, to load its store")
        else:
            command = f"python -m feeder --name {name} --model STORE --cache 128"
            self._say(f"waiting for a feeder called {name!r}; start one with: {command}")

    def _say(self, text: str) -> None:
        """Once; under a launcher, which starts the feeder itself, not at all."""
        if text != self._said:
            self._said = text
            log.log(logging.DEBUG if self._leash_fd is not None else logging.INFO, text)

    # Messages ----------------------------------------------------------------------------------

    def _handle(self, message: p.Message | ProtocolError) -> None:
        match message:
            case ProtocolError():
                self.stats.malformed += 1
                if self.stats.malformed <= _MALFORMED_SHOWN:
                    log.warning("refused a message: %s", message)
                self._channel.send(p.Failure("protocol", str(message)))
            case p.Welcome() if self.feeder is None:
                self._welcome(message)
            case p.Failure(code, text):
                self._refused(code, text)
            case p.StatusRequest():
                self._send(p.Status(self._fields()))
            case p.Goodbye(reason) if self.feeder is not None:
                self._lost(f"says goodbye ({reason})")
            case _ if self.feeder is None:
                self.stats.ignored += 1
            case _ if self._memory is None:
                self._early.append(message)
            case _:
                self._obey(message)

    def _obey(self, message: p.Message) -> None:
        assert self._memory is not None
        match message:
            case p.Grant(weight=weight):
                if not self._ledger.grant(message):
                    self.stats.ignored += 1
                    what = "names a segment, extent or slot that cannot be"
                    self._send(p.Failure("grant", f"grant of weight {weight} {what}"))
            case p.Revoke(slot, generation):
                wanted = () if self._needed is None else (self._needed,)
                lease = self._ledger.recall(slot, generation, wanted)
                if lease is not None:
                    self._give_back(lease)
            case p.Export(segment) if self._ledger.expects(segment):
                self._map(self._memory, message)
            case p.Retire(segment):
                self._ledger.retire(segment)
            case p.Status(fields):
                self._status = fields
            case _:
                self.stats.ignored += 1

    def _map(self, memory: Memory, export: p.Export) -> None:
        memory.bind_thread()
        try:
            segment = memory.open(export.kind, export.handle, export.size_bytes)
        except PeerError:
            # A feeder that is being killed gives up its memory before its end can be seen.
            if select.select([self._watch_fd], [], [], DYING_S)[0]:
                return
            raise
        self._ledger.add(export.segment, segment)

    def _welcome(self, welcome: p.Welcome) -> None:
        if self._fingerprint not in ("", welcome.fingerprint):
            self._channel.send(p.Goodbye("another store"))
            text = f"it has store {welcome.fingerprint}, this engine works with {self._fingerprint}"
            self._refused("store", text)
            return
        try:
            self._watch_fd = watch(welcome.pid)
        except PeerError:
            return  # gone already; the next one is waited for
        self._poller.add(self._watch_fd)
        if self._fingerprint:
            log.info("feeder %d takes over; going on", welcome.pid)
        self._fingerprint = welcome.fingerprint
        self.feeder = welcome
        self._verify = self._verify or welcome.verify
        if self._plan is not None:
            self._send(self._plan)
        if self._needed is not None:
            self._send(p.Need(self._needed))

    def _refused(self, code: str, text: str) -> None:
        if code == "busy":
            raise PeerError(text)
        if code == "store":
            self._refused_pid = Lock.holder(self._directory / "feeder.lock") or 0
            log.error("refused feeder %d: %s; waiting for another", self._refused_pid, text)
            return
        log.warning("the feeder reports %s: %s", code, text)

    def _lost(self, how: str) -> None:
        """Drop what this feeder lent. Its memory is unmapped when the last kernel is done with it."""
        assert self.feeder is not None
        log.warning("feeder %d %s; waiting for another", self.feeder.pid, how)
        self._said = ""
        self.stats.lost_feeders += 1
        self.feeder = None
        self._early.clear()
        for lease in self._ledger.lose():
            self._give_back(lease)
        self._shut()
        self._open()

    def _fields(self) -> p.Fields:
        stats = self.stats
        return {
            "uses": stats.uses,
            "waits": stats.waits,
            "stall_s": stats.stall_s,
            "lost_feeders": stats.lost_feeders,
            "peak_bytes": self.peak_bytes(),
        }
