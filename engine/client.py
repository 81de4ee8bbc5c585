"""The engine's end of the protocol: ``acquire`` blocks until a weight is granted, ``release`` returns it.

A thread of its own owns the socket. It takes grants as they come, returns slots when the kernels that
read them are complete, notices that the feeder is gone and takes the next one. The main thread sees
none of that: it waits a little longer.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import protocol as p
from common.channel import Client, Poller
from common.errors import PeerError, ProtocolError, WeightFeederError
from common.log import log
from common.memory import Memory
from common.process import Lock, watch
from common.wait import Completions, Wakeup
from engine.ledger import Ledger, Lease

HELLO_INTERVAL_S = 0.1
HELLO_REPEAT_S = 1.0
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

    def __init__(self, directory: Path, leash_fd: int | None = None) -> None:
        self._directory, self._leash_fd = directory, leash_fd
        self.stats = Stats()
        self.feeder: p.Welcome | None = None  # the one we talk to now
        self._condition = threading.Condition()  # guards all that both threads touch
        self._ledger = Ledger()
        self._waiting: dict[int, None] = {}  # weights that the main thread is blocked on
        self._early: list[p.Message] = []  # came before there was a memory to map segments in
        self._order: dict[int, None] | None = {}  # the plan as it is learned; None once it is
        self._plan: p.Plan | None = None
        self._fingerprint = ""
        self._memory: Memory | None = None
        self._failure: WeightFeederError | None = None
        self._status: p.Fields | None = None
        self._outbox: deque[p.Message] = deque()
        self._returned: deque[Lease] = deque()
        self._said = ""
        self._refused_pid = 0
        self._wakeup = Wakeup()
        self._completions: Completions[Lease] = Completions("kernels", self._wakeup)
        self._closing = ""
        self._thread = threading.Thread(target=self._run, name="client", daemon=True)
        self._thread.start()

    # The main thread's side --------------------------------------------------------------------

    def wait_for_feeder(self) -> p.Welcome:
        """Blocks until a feeder has answered."""
        with self._condition:
            self._wait(lambda: self.feeder is not None)
            assert self.feeder is not None
            return self.feeder

    def use(self, memory: Memory) -> None:
        """From now on segments are mapped in ``memory``."""
        with self._condition:
            self._memory = memory
        self._wakeup.set()

    def acquire(self, weight: int) -> Lease:
        """The lease of ``weight``; blocks until the feeder has granted it."""
        with self._condition:
            lease = self._ledger.take(weight) or self._wait_for(weight)
            self.stats.uses += 1
            if self._order is not None:
                self._learn(weight)
            return lease

    def release(self, lease: Lease) -> None:
        """The work queued so far is the last that reads the lease."""
        with self._condition:
            if self._ledger.put(lease):
                self._return(lease)

    def ask_status(self, timeout_s: float = 2.0) -> p.Fields:
        """The feeder's own figures; empty if it does not answer in time."""
        with self._condition:
            self._status = None
            self._post(p.StatusRequest())
            self._wait(lambda: self._status is not None, timeout_s)
            return self._status or {}

    def peak_bytes(self) -> int:
        """The most device memory that this process has had, mapped slots not counted."""
        return self._memory.peak_bytes() if self._memory else 0

    def close(self, reason: str = "done") -> None:
        """Return everything and say goodbye. The kernels that read slots must be complete."""
        if not self._closing:
            self._closing = reason
            self._wakeup.set()
            self._thread.join()
            self._completions.close()
            self._ledger.close()
            self._wakeup.close()

    def _wait_for(self, weight: int) -> Lease:
        start = time.perf_counter()
        self._waiting[weight] = None
        self._post(p.Need(weight))
        taken: list[Lease] = []

        def granted() -> bool:
            lease = self._ledger.take(weight)
            if lease is not None:
                taken.append(lease)
            return lease is not None

        try:
            self._wait(granted)
        finally:
            del self._waiting[weight]
            self.stats.waits += 1
            self.stats.stall_s += time.perf_counter() - start
        return taken[0]

    def _wait(self, true: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Until ``true()`` (or the time is up). Raises what ended the client thread, if it ended."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not true():
            if self._failure is not None:
                raise self._failure
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            self._condition.wait(left)

    def _learn(self, weight: int) -> None:
        assert self._order is not None
        if weight not in self._order:
            self._order[weight] = None
            return
        self._plan = p.Plan(tuple(self._order))
        self._order = None
        self._post(self._plan)

    def _post(self, message: p.Message) -> None:
        self._outbox.append(message)
        self._wakeup.set()

    def _return(self, lease: Lease) -> None:
        """Nothing more will be queued that reads the lease."""
        wait = self._memory.marker() if self._memory else None
        if wait is None:
            self._returned.append(lease)
            self._wakeup.set()
        else:
            self._completions.submit(wait, lease)

    # The client thread's side ------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self._serve_one()
        except Exception as error:
            failure = error if isinstance(error, WeightFeederError) else PeerError(repr(error))
            with self._condition:
                self._failure = failure
                self._condition.notify_all()
            if failure is not error:
                raise

    def _serve_one(self) -> None:
        """One feeder, from waiting for it to losing it. A new one gets a new socket, so that nothing
        meant for the old one reaches it."""
        self._channel = Client(self._directory / "feeder.sock")
        self._poller = Poller()
        self._channel.register(self._poller)
        self._poller.add(self._wakeup.fd)
        if self._leash_fd is not None:
            self._poller.add(self._leash_fd)
        self._watch_fd = -1
        self._next_hello = 0.0
        try:
            lost = False
            while not (lost or self._closing):
                ready = self._poller.wait(None if self.feeder else HELLO_INTERVAL_S)
                self._wakeup.clear()
                if self._leash_fd in ready:
                    self._orphaned()
                lost = self._turn(ready)
            if self._closing:
                self._goodbye()
        finally:
            self._channel.close()
            if self._watch_fd >= 0:
                os.close(self._watch_fd)

    def _turn(self, ready: set[int]) -> bool:
        """Whether the feeder is lost."""
        for message in self._channel.receive():
            if self._handle(message):
                return True
        if self._watch_fd in ready:
            self._lost("has ended")
            return True
        if self.feeder is None:
            self._hello()
        with self._condition:
            self._settle()
            if self.feeder is not None:
                while self._outbox:
                    self._channel.send(self._outbox.popleft())
        return False

    def _orphaned(self) -> None:
        assert self._leash_fd is not None
        log.error("the launcher is gone")
        self._poller.remove(self._leash_fd)
        self._leash_fd = None
        os.kill(os.getpid(), signal.SIGTERM)

    def _goodbye(self) -> None:
        if self.feeder is not None:
            self._turn(set())
            self._channel.send(p.Goodbye(self._closing))
            # LINGER is 0: give the goodbye a moment to leave. If it does not, our death says it.
            time.sleep(0.02)

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
        if text != self._said:
            self._said = text
            log.info(text)

    def _handle(self, message: p.Message | ProtocolError) -> bool:
        """Whether the feeder is lost."""
        match message:
            case ProtocolError():
                self.stats.malformed += 1
                if self.stats.malformed <= _MALFORMED_SHOWN:
                    log.warning("refused a message: %s", message)
                self._channel.send(p.Failure("protocol", str(message)))
            case p.Welcome() if self.feeder is None:
                return self._welcome(message)
            case p.Failure(code, text):
                self._refused(code, text)
            case p.StatusRequest():
                self._channel.send(p.Status(self._fields()))
            case p.Goodbye(reason) if self.feeder is not None:
                self._lost(f"says goodbye ({reason})")
                return True
            case _ if self.feeder is not None:
                with self._condition:
                    if self._memory is None or self._early:
                        self._early.append(message)  # in order: a grant follows its export
                    else:
                        self._obey(message)
            case _:
                self.stats.ignored += 1
        return False

    def _obey(self, message: p.Message) -> None:
        assert self._memory is not None
        match message:
            case p.Grant(weight=weight):
                if not self._ledger.grant(message):
                    self.stats.ignored += 1
                    text = f"grant of weight {weight} names a segment, extent or slot that cannot be"
                    self._channel.send(p.Failure("grant", text))
                elif weight in self._waiting:
                    self._condition.notify_all()
            case p.Revoke(slot, generation):
                lease = self._ledger.recall(slot, generation, self._waiting)
                if lease is not None:
                    self._return(lease)
            case p.Export(segment, kind, size_bytes, handle):
                self._memory.bind_thread()
                self._ledger.add(segment, self._memory.open(kind, handle, size_bytes))
            case p.Retire(segment):
                self._ledger.retire(segment)
            case p.Status(fields):
                self._status = fields
                self._condition.notify_all()
            case _:
                self.stats.ignored += 1

    def _welcome(self, welcome: p.Welcome) -> bool:
        if self._fingerprint not in ("", welcome.fingerprint):
            self._channel.send(p.Goodbye("another store"))
            text = f"it has store {welcome.fingerprint}, this engine works with {self._fingerprint}"
            self._refused("store", text)
            return False
        try:
            self._watch_fd = watch(welcome.pid)
        except PeerError:
            return True  # gone already; the next one is waited for
        self._poller.add(self._watch_fd)
        with self._condition:
            if self._fingerprint:
                log.info("feeder %d takes over; going on", welcome.pid)
            self._fingerprint = welcome.fingerprint
            self.feeder = welcome
            self._outbox.clear()  # it was meant for a former feeder
            if self._plan is not None:
                self._outbox.append(self._plan)
            self._outbox.extend(p.Need(weight) for weight in self._waiting)
            self._condition.notify_all()
        return False

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
        with self._condition:
            self.stats.lost_feeders += 1
            self.feeder = None
            self._early.clear()
            self._outbox.clear()
            for lease in self._ledger.lose():
                self._return(lease)

    def _settle(self) -> None:
        """Return what the kernels are done with; unmap what nothing reads any more."""
        if self._memory is not None:
            for message in self._early:
                self._obey(message)
            self._early.clear()
        done = list(self._returned)
        self._returned.clear()
        for lease, failure in self._completions.done():
            if failure is not None:
                raise PeerError(f"the device failed: {failure}") from failure
            done.append(lease)
        told = [lease.grant for lease in done if self._ledger.returned(lease)]
        if told:
            slots = tuple(grant.slot for grant in told)
            self._outbox.append(p.Release(slots, tuple(grant.generation for grant in told)))
        for segment in self._ledger.unmap_idle():
            self._outbox.append(p.Retired(segment))

    def _fields(self) -> p.Fields:
        stats = self.stats
        return {
            "uses": stats.uses,
            "waits": stats.waits,
            "stall_s": stats.stall_s,
            "lost_feeders": stats.lost_feeders,
            "peak_bytes": self.peak_bytes(),
        }
