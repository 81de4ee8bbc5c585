"""The engine's end of the protocol: ``acquire`` blocks until a weight is granted, ``release`` returns it.

The main thread does the talking itself: it takes grants from the socket when it needs one, and returns
slots when the kernels that read them are complete, at its next ``acquire``. A second thread looks in
now and then, for the times when the main thread computes, samples or sits in a debugger: it returns
what was revoked, answers questions, and notices that the feeder is gone. One lock guards everything,
the socket too. Two threads that shared the work of each weight spent most of the time handing each
other Python's interpreter lock: docs/decisions/0002-one-thread.md.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import protocol as p
from common.errors import PeerError, SlotCorruptError, WeightFeederError
from common.memory import Memory
from common.verify import slot_checksum
from common.wait import Pending
from engine.connection import Connection
from engine.ledger import Lease, Ledger

KEEPER_INTERVAL_S = 0.05  # how often the second thread looks in
SPIN_S = 0.005  # how long a blocked acquire asks without sleeping whether kernels are complete
#: The same on a GPU while it has no kernel to ask for: to be woken takes as long as a fill.
LINGER_S = 0.0005
#: Nor does it say at once that it needs what most likely is on its way: the feeder would have to read
#: that before it can go on.
NEED_AFTER_S = 0.0002
#: An engine that need not wait looks only now whether kernels are complete: their slots are then told of
#: in one message, which is half the work for both sides. One that has to wait looks at once.
RETURN_TOGETHER = 2
#: How often it looks meanwhile whether somebody has died, which takes calls of the system.
LOOK_S = 0.001


class NotLent(Exception):
    """A draft model's weight is gone, with the feeder that lent it."""


@dataclass
class Stats:
    """What the engine has done and how long it waited. ``stall_s``: blocked on grants."""

    uses: int = 0
    waits: int = 0
    stall_s: float = 0.0


class WeightClient:
    """One engine's line to whatever feeder has the run directory. Close it to return everything."""

    def __init__(self, directory: Path, leash_fd: int | None = None, verify: bool = False) -> None:
        """``leash_fd``: readable when the launcher is gone. ``verify``: check every slot's bytes
        when it is taken and before it is returned, which is slow."""
        self._verify = verify
        self.stats = Stats()
        self._checksums: dict[tuple[int, str], int] = {}  # in verify mode, by weight and format
        self.packed = False  # whether slots hold packed weights, as far as they can be
        self.names: list[str] = []  # of the weights, for errors; empty until they are known
        self._own_weights = 0  # of the model; those from there on are a draft's
        self._lock = threading.RLock()
        self._ledger = Ledger()
        self._pending: Pending[Lease] = Pending()  # released, their kernels still run
        self._idle: list[Lease] = []  # released and complete, the feeder to be told
        self._needed: int | None = None  # the weight that the main thread is blocked on
        self._foreseen = False  # whether the last weights came without being asked for
        self._early: list[p.Message] = []  # came before there was a memory to map segments in
        self._order: dict[int, None] | None = {}  # the plan as it is learned; None once it is
        self._plan: p.Plan | None = None
        self._memory: Memory | None = None
        self._stream: Any = None
        self._linger_s = 0.0
        self._failure: WeightFeederError | None = None
        self._status: p.Fields | None = None
        self._said: p.Fields = {}  # the last status of the feeder that is there
        self._streamed: dict[int, int] = {}  # bytes by the pid of the feeder, as it said last
        self._shrink: p.Shrink | None = None  # asked, and not answered
        self._shrunk = 0
        self._connection = Connection(directory, leash_fd, self._found, self._lost)
        self._closing = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._keeper.start()

    # The main thread's calls -------------------------------------------------------------------

    def wait_for_feeder(self) -> p.Welcome:
        """Blocks until a feeder has answered."""
        connection = self._connection
        with self._lock:
            self._pump_until(lambda: connection.feeder is not None)
            assert connection.feeder is not None
            return connection.feeder

    def use(self, memory: Memory) -> None:
        """From now on segments are mapped in ``memory``; kernels run on the current stream."""
        with self._lock:
            self._memory = memory
            self._stream = memory.stream()
            self._linger_s = LINGER_S if memory.device.type == "cuda" else 0.0
            if self._connection.feeder is not None:
                memory.limit(self._connection.feeder.engine_bytes)
            for message in self._early:
                self._obey(message)
            self._early.clear()

    def acquire(self, weight: int) -> Lease:
        """The lease of ``weight``; blocks until the feeder has granted it. NotLent for a weight of a
        draft that is not there: nobody waits for those."""
        with self._lock:
            lease = self._ledger.take(weight)
            if lease is None:
                lease = self._wait_for(weight)  # which returns what is complete, too
            else:
                self._foreseen = True
                if len(self._pending) >= RETURN_TOGETHER or self._idle:
                    self._return_complete()
            self._taken(lease)
            return lease

    def try_acquire(self, weights: Sequence[int]) -> list[Lease] | None:
        """The leases of all ``weights`` if all are granted by now; else None, and none is taken.

        For a kernel that reads several weights. Nobody may hold a lease and block for another: with
        a cache of one weight neither would ever come. None means: acquire them one after the other.
        """
        with self._lock:
            if len(self._pending) or self._idle:
                self._return_complete()
            leases = self._ledger.take_all(weights)
            if leases is None:
                self._turn()  # they may have been granted long ago, and only be unread
                leases = self._ledger.take_all(weights)
            for lease in leases or ():
                self._taken(lease)
            return leases

    def try_hold(self, weights: Sequence[int]) -> list[Lease] | None:
        """The leases of all ``weights`` if all are here to stay; else None, and none is taken. They may
        be held over many passes, as long as `recalled` says False, and are released in the end."""
        with self._lock:
            self._turn()
            if self._verify or not self._ledger.standing(weights):
                return None  # in verify mode each use is checked
            return self._ledger.take_all(weights)

    def stay(self, weights: Sequence[int]) -> bool:
        """Whether all ``weights`` are granted until they are revoked, by what has been read so far."""
        with self._lock:
            return self._ledger.standing(weights)

    def recalled(self, leases: Iterable[Lease]) -> bool:
        """Whether the feeder wants any of these held leases back, or is gone: release them."""
        with self._lock:
            self._turn()
            return any(lease.recalled for lease in leases)

    def used(self, count: int) -> None:
        """So many weights were used that are held."""
        self.stats.uses += count

    def release(self, lease: Lease) -> None:
        """The work queued so far is the last that reads the lease."""
        with self._lock:
            if self._verify:
                self._check(lease, "release")
            if self._ledger.put(lease):
                self._give_back(lease)

    def shrink(self, size_bytes: int) -> int:
        """Device memory is short: the feeder's slots are to take so many bytes less. Blocks until they
        do; returns how many they are, 0 if none. No lease may be taken; the pass begins anew."""
        with self._lock:
            if self._order is not None:
                self._order.clear()  # of a pass that did not end
            self._shrink = p.Shrink(size_bytes)
            self._connection.send(self._shrink)
            self._pump_until(lambda: self._shrink is None)
            return self._shrunk

    def ask_status(self, timeout_s: float = 2.0) -> p.Fields:
        """The feeder's own figures; empty if it does not answer in time."""
        with self._lock:
            if self._memory is not None:  # any thread may ask
                self._memory.bind_thread()
            self._turn()  # an answer to an earlier question is none to this one
            self._status = None
            self._connection.send(p.StatusRequest())
            self._pump_until(lambda: self._status is not None, timeout_s)
            return self._status or {}

    def request_status(self) -> None:
        """Ask for the feeder's figures, as ``streamed_bytes`` needs them, without waiting."""
        with self._lock:
            self._connection.send(p.StatusRequest())

    def glance(self) -> p.Fields:
        """What the feeder said of itself last, empty if there is none; newer figures are asked for.
        For any thread: it never waits, not even for a main thread that is blocked."""
        if self._lock.acquire(blocking=False):
            try:
                self._connection.send(p.StatusRequest())
            finally:
                self._lock.release()
        return self._said

    @property
    def has_feeder(self) -> bool:
        """Whether a feeder is there, as far as is known. For any thread."""
        return self._connection.feeder is not None

    @property
    def absent_s(self) -> float:
        """How long there was no feeder, between one that went and the next."""
        return self._connection.absent_s

    @property
    def lost_feeders(self) -> int:
        """How many feeders went while this engine had them."""
        return self._connection.lost_feeders

    @property
    def streamed_bytes(self) -> int:
        """What has crossed the link, by what each feeder so far has said last. One that was killed
        has said nothing of its last moments."""
        return sum(self._streamed.values())

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
            self._return_complete()
            self._connection.close(reason)
            self._ledger.close()

    def _taken(self, lease: Lease) -> None:
        self.stats.uses += 1
        own = lease.grant.weight < self._own_weights
        if own and self._order is not None and lease.readers == 1:
            self._learn(lease.grant.weight)  # more readers, as at a breakpoint, are not in order
        if self._verify:
            self._check(lease, "grant")

    def _wait_for(self, weight: int) -> Lease:
        start = time.perf_counter()
        taken: list[Lease] = []

        def granted() -> bool:
            lease = self._ledger.take(weight)
            if lease is not None:
                taken.append(lease)
            return lease is not None

        self._turn()  # it may have been granted long ago, and only be unread
        if granted():
            self._foreseen = True
            return taken[0]
        if weight >= self._own_weights:
            raise NotLent(f"weight {weight} of the draft model is not lent any more")
        self._needed = weight
        try:
            if self._foreseen and self._linger_s:
                self._pump_until(granted, NEED_AFTER_S)
                self._foreseen = bool(taken)
            # A need must not overtake the release of its weight.
            if not taken and self._ledger.returning(weight):
                self._pump_until(lambda: granted() or not self._ledger.returning(weight))
            if not taken:
                self._connection.send(p.Need(weight))
                self._pump_until(granted)
        finally:
            self._needed = None
            self.stats.waits += 1
            self.stats.stall_s += time.perf_counter() - start
        return taken[0]

    def _check(self, lease: Lease, moment: str) -> None:
        found, grant = slot_checksum(lease.data), lease.grant
        # A feeder without --verify sends none: then a weight must be what it was at its first use.
        key = (grant.weight, grant.format)
        expected = self._checksums.setdefault(key, grant.checksum or found)
        if found != expected:
            name = self.names[grant.weight] if self.names else f"weight {grant.weight}"
            raise SlotCorruptError(
                f"verify at {moment}: {name} in slot {grant.slot}, generation"
                f" {grant.generation}, has checksum {found:x}, expected {expected:x}: the slot was"
                " written to"
            )

    def _learn(self, weight: int) -> None:
        assert self._order is not None
        if weight not in self._order:
            self._order[weight] = None
            return
        self._plan = p.Plan(tuple(self._order))
        self._order = None
        self._connection.send(self._plan)

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
        start, look = time.monotonic(), LOOK_S
        while True:
            self._turn()
            if true():
                return
            waited = time.monotonic() - start
            if timeout_s is not None and waited >= timeout_s:
                return
            if self._failure is not None:
                raise self._failure
            if waited < (SPIN_S if len(self._pending) else self._linger_s):
                if waited >= look:
                    look = waited + LOOK_S
                    self._connection.wait(0)
                continue
            patience = 0.001 if len(self._pending) else 0.5  # nothing wakes us when a kernel ends
            if timeout_s is not None:
                patience = min(patience, timeout_s - waited)
            self._connection.wait(patience)

    def _keep(self) -> None:
        """The second thread: a turn now and then, unless the main thread is at it."""
        bound = False
        try:
            while not self._closing.wait(KEEPER_INTERVAL_S):
                if self._lock.acquire(blocking=False):
                    try:
                        if self._memory is not None and not bound:
                            self._memory.bind_thread()
                            bound = True
                        self._connection.wait(0)
                        self._turn()
                    finally:
                        self._lock.release()
        except WeightFeederError as error:
            self._failure = error
        except Exception as error:
            self._failure = PeerError(f"the engine's client: {error!r}")
            raise

    def _turn(self) -> None:
        """Everything that can be done now, without blocking. What goes wrong ends the main thread,
        whichever thread meets it."""
        try:
            self._talk()
        except WeightFeederError as error:
            self._failure = self._failure or error
            raise

    def _talk(self) -> None:
        for message in self._connection.messages():
            if isinstance(message, p.StatusRequest):
                self._connection.send(p.Status(self._fields()))
            elif self._memory is None:
                self._early.append(message)
            else:
                self._obey(message)
        self._return_complete()

    def _return_complete(self) -> None:
        """Tell the feeder what the kernels are done with; unmap what nothing reads any more."""
        done = self._pending.done()
        if self._idle:
            done += self._idle
            self._idle = []
        if done:
            told = [lease.grant for lease in done if self._ledger.returned(lease)]
            if told:
                self._returned(told)
        for segment in self._ledger.unmap_idle():
            self._connection.send(p.Retired(segment))

    def _returned(self, grants: list[p.Grant]) -> None:
        slots = tuple(grant.slot for grant in grants)
        self._connection.send(p.Release(slots, tuple(grant.generation for grant in grants)))

    # What the feeder says ----------------------------------------------------------------------

    def _found(self) -> None:
        """A feeder is there: tell it what it has to know."""
        feeder = self._connection.feeder
        assert feeder is not None
        self._verify = self._verify or feeder.verify
        self._own_weights = feeder.weights
        if self._plan is not None:
            self._connection.send(self._plan)
        if self._needed is not None:
            self._connection.send(p.Need(self._needed))
        if self._memory is not None:
            self._memory.limit(feeder.engine_bytes)
        if self._shrink is not None:
            self._connection.send(self._shrink)

    def _lost(self) -> None:
        """Drop what the feeder lent. Its memory is unmapped when the last kernel is done with it."""
        self._early.clear()
        self._said = {}
        for lease in self._ledger.lose():
            self._give_back(lease)

    def _obey(self, message: p.Message) -> None:
        assert self._memory is not None
        match message:
            case p.Grant(weight=weight) if self._foreign(weight):
                pass
            case p.Grant(weight=weight):
                if not self._ledger.grant(message):
                    self._connection.ignored += 1
                    what = "is an old one, or names a segment, extent or slot that cannot be"
                    self._connection.complain("grant", f"grant of weight {weight} {what}")
            case p.Grants():
                for grant in message.each():
                    self._obey(grant)
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
                self._status = self._said = fields
                pid, streamed = fields.get("pid"), fields.get("streamed_bytes")
                if isinstance(pid, int) and isinstance(streamed, int):
                    self._streamed[pid] = streamed
            case p.Shrunk(size_bytes, engine_bytes) if self._shrink is not None:
                self._shrink, self._shrunk = None, size_bytes
                self._memory.limit(engine_bytes)
            case _:
                self._connection.ignored += 1

    def _foreign(self, weight: int) -> bool:
        """Whether it belongs to another draft model than this engine knows."""
        return weight >= self._own_weights and not self._connection.lends_draft

    def _map(self, memory: Memory, export: p.Export) -> None:
        memory.bind_thread()
        try:
            segment = memory.open(export.kind, export.handle, export.size_bytes)
        except PeerError:
            if self._connection.dying():
                return
            raise
        self._ledger.add(export.segment, segment)
        self.packed = export.packed
        memory.limit(export.engine_bytes)

    def _fields(self) -> p.Fields:
        stats = self.stats
        return {
            "uses": stats.uses,
            "waits": stats.waits,
            "stall_s": stats.stall_s,
            "lost_feeders": self._connection.lost_feeders,
            "malformed": self._connection.malformed,
            "ignored": self._connection.ignored,
            "peak_bytes": self.peak_bytes(),
        }
