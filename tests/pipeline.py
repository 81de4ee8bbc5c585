"""A feeder and an engine without processes: the real scheduler and the real ledger, with queues between.

The queues are the socket, the link and the GPU. Whatever is in one of them may take any time to get
out, in order; a random choice among all that could happen next makes every history that is legal. What
a fill leaves in a slot is the weight's number, so that a slot that is read too early, or refilled while
it is read, shows. After every event `Pipeline.check` checks what must hold at every moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from common import protocol as p
from common.plan import Capacity, Plan
from common.slots import HELD, State
from engine.ledger import Lease, Ledger
from feeder.arena import aligned
from feeder.scheduler import Fill, Grant, Revoke, Scheduler
from feeder.strategies.base import Strategy

POISON = 255  # no weight's number


class Deadlock(AssertionError):
    """The engine waits and nothing is on its way that could end that."""


class Memory:
    """In the place of a segment: bytes that can be sliced without a copy."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.tensor = memoryview(bytearray(size_bytes))
        self.mappings = 0


class Mapped:
    """A segment as the engine maps it."""

    def __init__(self, memory: Memory) -> None:
        self.size_bytes, self.tensor, self._memory = memory.size_bytes, memory.tensor, memory
        memory.mappings += 1

    def close(self) -> None:
        self._memory.mappings -= 1


class Engine:
    """What engine/client.py does, one small piece at a time.

    ``hold``: how many leases it may have at once. It takes several only together and when all are
    granted, so it never blocks while it holds one.
    """

    def __init__(
        self, order: Iterator[int], random: Random, asynchronous: bool, hold: int = 1
    ) -> None:
        self.ledger = Ledger()
        self.inbox: deque[Any] = deque()  # from the feeder
        self.outbox: deque[Any] = deque()  # to the feeder
        self.kernels: deque[Lease] = deque()  # queued; all but the last may run for a while yet
        self.reading: list[Lease] = []
        self.needed: int | None = None
        self.uses = self.waits = self.together = 0
        self._next: deque[int] = deque()
        self._hold = hold
        self._order, self._random, self._asynchronous = order, random, asynchronous

    # The main thread ---------------------------------------------------------------------------

    @property
    def blocked(self) -> bool:
        return self.needed is not None

    def go(self) -> None:
        """Acquire the next weight, or queue the kernel that reads the acquired one and release it."""
        if self.reading:
            self._random.shuffle(self.reading)
            lease = self.reading.pop()
            self._read(lease)
            if self.ledger.put(lease):
                self._give_back(lease)
            return
        wanted = 1 if self._hold == 1 else self._random.randint(1, self._hold)
        while len(self._next) < wanted:
            self._next.append(next(self._order))
        for _ in range(self._random.randint(0, len(self.inbox))):  # what has come, it looks at
            self._obey(self.inbox.popleft())
        if (wanted > 1 and self._take(wanted)) or self._take(1):
            return
        weight = self._next[0]
        if not self.ledger.returning(weight):
            self.needed = weight
            self.waits += 1
            self.outbox.append(p.Need(weight))

    def _take(self, count: int) -> bool:
        """The next ``count`` weights together, if all are there."""
        weights = [self._next[i] for i in range(count)]
        leases = self.ledger.take_all(weights)
        if leases is None:
            return False
        assert [lease.grant.weight for lease in leases] == weights
        for lease in leases:
            self._read(lease)
            self._next.popleft()
        self.reading, self.needed = leases, None
        self.uses += count
        self.together += count > 1
        return True

    # The socket and the GPU --------------------------------------------------------------------

    def deliver(self) -> None:
        """One message or a few arrive; who waits for a grant looks whether it is there."""
        for _ in range(self._random.randint(1, len(self.inbox))):
            self._obey(self.inbox.popleft())
        if self.needed is not None:
            self._take(1)

    def complete(self) -> None:
        """The oldest kernels are complete: their slots go back."""
        done = [self.kernels.popleft() for _ in range(self._random.randint(1, len(self.kernels)))]
        self._return(done)

    def _obey(self, message: Any) -> None:
        match message:
            case p.Grant():
                assert self.ledger.grant(message), "the engine refuses a grant"
            case p.Revoke(slot, generation):
                wanted = () if self.needed is None else (self.needed,)
                lease = self.ledger.recall(slot, generation, wanted)
                if lease is not None:
                    self._give_back(lease)
            case (segment, Memory() as memory):
                self.ledger.add(segment, Mapped(memory))  # type: ignore[arg-type]
            case p.Retire(segment):
                self.ledger.retire(segment)
                self._return([])

    def _give_back(self, lease: Lease) -> None:
        if self._asynchronous:
            self.kernels.append(lease)
        else:
            self._return([lease])

    def _return(self, done: list[Lease]) -> None:
        for lease in done:
            self._read(lease)
        told = [lease.grant for lease in done if self.ledger.returned(lease)]
        if told:
            slots, generations = zip(*((g.slot, g.generation) for g in told), strict=True)
            self.outbox.append(p.Release(slots, generations))
        self.outbox.extend(p.Retired(segment) for segment in self.ledger.unmap_idle())

    def _read(self, lease: Lease) -> None:
        found = set(bytes(lease.data))  # type: ignore[call-overload]
        assert found == {lease.grant.weight}, f"weight {lease.grant.weight} reads as {found}"

    def die(self) -> None:
        self.inbox.clear()
        self.kernels.clear()
        self.ledger.close()


class Pipeline:
    """One feeder, and one engine after the other."""

    def __init__(
        self,
        sizes: Sequence[int],
        capacity: Capacity,
        strategy: Strategy,
        seed: int = 0,
        asynchronous: bool = True,
        first_generation: int = 0,
        hold: int = 1,
    ) -> None:
        self.random, self._hold = Random(seed), hold
        self.sizes = list(sizes)
        self.fallbacks: list[str] = []
        self.scheduler = Scheduler(
            Plan(tuple(range(len(sizes)))), sizes, capacity, strategy,
            first_generation, self.fallbacks.append,
        )  # fmt: skip
        self.memory, self.segment = Memory(capacity.size_bytes), 0
        self.fills: deque[Fill] = deque()
        self.lent: dict[int, Grant] = {}  # by slot: granted, and not released as far as we know
        self.filled: list[int] = []  # every fill, by weight
        self.foreseen: list[int] = []  # those that were begun for another reason than a need
        self.stale = 0  # messages that must have been ignored
        self.asked: int | None = None  # the last need
        self.engine: Engine | None = None
        self.dead = False
        self._asynchronous = asynchronous
        self._resize: tuple[Capacity, Strategy] | None = None
        self._told: set[int] = set()  # segments that the engine knows
        self._retiring = False
        # How fast each queue is, so that some histories have slow fills and others slow kernels.
        self._speed = {
            name: self.random.choice((0.03, 0.3, 1.0))
            for name in ("execute", "receive", "fill", "deliver", "complete", "go")
        }
        self._dirty = True

    # What the world does -----------------------------------------------------------------------

    def attach(self, order: Iterator[int]) -> Engine:
        """A new engine, which uses the weights in ``order``, says hello."""
        assert self.engine is None
        self.engine = engine = Engine(order, self.random, self._asynchronous, self._hold)
        self.dead = False
        if self._resize is None:
            self._export()
        self.scheduler.attach()
        self._dirty = True
        return engine

    def kill(self) -> None:
        """The engine dies; the feeder does not know yet."""
        assert self.engine is not None
        self.engine.die()
        self.dead = True

    def detach(self) -> None:
        """The feeder learns that the engine has died. What it had sent and nobody read is gone."""
        self.engine = None
        self.lent.clear()
        self._told.clear()
        self._retiring = False
        self.scheduler.detach()
        self._dirty = True
        self.check()

    def swap(self, strategy: Strategy) -> None:
        self.scheduler.set_strategy(strategy)
        self._dirty = True
        self.check()

    def resize(self, capacity: Capacity, strategy: Strategy) -> None:
        """Begin to change the arena. Refused, as the feeder does, while one change is under way."""
        if self._resize is None:
            self._resize = (capacity, strategy)
            self.scheduler.drain()
            self._dirty = True

    @property
    def resizing(self) -> bool:
        return self._resize is not None

    def stale_release(self) -> None:
        """A release of a grant that is none any more, or never was one."""
        slot = self.random.choice([*range(12), p.MAX_INT])
        lent = self.lent.get(slot)
        generation = self.random.randint(0, 40) if lent is None else lent.generation - 1
        if generation < 0:
            return
        before = [(s.id, s.state, s.generation) for s in self.scheduler.slots]
        self.scheduler.released(slot, generation)
        assert before == [(s.id, s.state, s.generation) for s in self.scheduler.slots]
        self.stale += 1
        self.check()

    # What happens by itself --------------------------------------------------------------------

    def possible(self, go: bool = True) -> list[str]:
        """What could happen next."""
        engine = self.engine
        names = []
        if self._dirty:
            names.append("execute")
        if self.fills:
            names.append("fill")
        if engine is not None:
            if engine.outbox:
                names.append("receive")
            if not self.dead:
                if engine.inbox:
                    names.append("deliver")
                if engine.kernels:
                    names.append("complete")
                if go and not engine.blocked:
                    names.append("go")
        return names

    def advance(self, go: bool = True) -> bool:
        """Let one thing happen, of those that could; False if there is none."""
        names = self.possible(go)
        if not names:
            return False
        name = self.random.choices(names, [self._speed[n] for n in names])[0]
        getattr(self, f"_do_{name}")()
        self.check()
        return True

    def settle(self) -> None:
        """Everything happens that can without the engine's main thread."""
        self.run_until(lambda: not self.possible(go=False), go=False)

    def run_until(self, true: Any, limit: int = 5000, go: bool = True) -> None:
        """Until ``true()``. Deadlock if it cannot become true, or has not in ``limit`` events."""
        for _ in range(limit):
            if true():
                return
            if not self.advance(go):
                raise Deadlock(self.situation())
        raise Deadlock(f"no end: {self.situation()}")

    def use(self, count: int, limit: int = 5000) -> None:
        """Until the engine has acquired ``count`` more weights; each within ``limit`` events."""
        engine = self.engine
        assert engine is not None
        for _ in range(count):
            goal = engine.uses + 1
            self.run_until(lambda goal=goal: engine.uses >= goal, limit)

    def _do_execute(self) -> None:
        self._dirty = False
        self._obey()
        if self._resize is not None and self.scheduler.drained:
            if self.segment in self._told:
                if not self._retiring:
                    self._retiring = True
                    self._send(p.Retire(self.segment))
                return
            assert self.memory.mappings == 0 or self.engine is None or self.dead
            (capacity, strategy), self._resize = self._resize, None
            self._retiring = False
            self.memory, self.segment = Memory(capacity.size_bytes), self.segment + 1
            self.scheduler.resize(capacity, strategy)
            self._export()
            self._obey()

    def _do_fill(self) -> None:
        fill = self.fills.popleft()
        size = aligned(self.sizes[fill.weight])
        self.memory.tensor[fill.offset_bytes :][:size] = bytes([fill.weight]) * size
        self.scheduler.filled(fill.slot)
        self._dirty = True

    def _do_receive(self) -> None:
        assert self.engine is not None
        message = self.engine.outbox.popleft()
        match message:
            case p.Need(weight):
                self.asked = weight
                self.scheduler.need(weight)
            case p.Release(slots, generations):
                for slot, generation in zip(slots, generations, strict=True):
                    assert self.lent.pop(slot).generation == generation
                    self.scheduler.released(slot, generation)
            case p.Plan(weights):
                self.scheduler.set_plan(Plan(weights))
            case p.Retired(segment):
                self._told.discard(segment)
        self._dirty = True

    def _do_deliver(self) -> None:
        assert self.engine is not None
        self.engine.deliver()

    def _do_complete(self) -> None:
        assert self.engine is not None
        self.engine.complete()

    def _do_go(self) -> None:
        assert self.engine is not None
        self.engine.go()

    # The feeder's hands ------------------------------------------------------------------------

    def _obey(self) -> None:
        scheduler = self.scheduler
        for command in scheduler.step():
            match command:
                case Fill(slot, weight, offset):
                    size = aligned(self.sizes[weight])
                    self.memory.tensor[offset:][:size] = bytes([POISON]) * size
                    self.fills.append(command)
                    self.filled.append(weight)
                    if weight != self.asked:
                        self.foreseen.append(weight)
                case Grant():
                    assert command.slot not in self.lent, "granted twice"
                    self.lent[command.slot] = command
                    self._send(
                        p.Grant(
                            weight=command.weight, slot=command.slot, checksum=0,
                            generation=command.generation, segment=self.segment,
                            offset_bytes=command.offset_bytes, format="dequantized",
                            size_bytes=self.sizes[command.weight], standing=command.standing,
                        )
                    )  # fmt: skip
                case Revoke(slot, generation):
                    assert self.lent[slot].generation == generation, "not lent, and asked back"
                    self._send(p.Revoke(slot, generation))

    def _send(self, message: Any) -> None:
        if self.engine is not None and not self.dead:
            self.engine.inbox.append(message)

    def _export(self) -> None:
        if self.engine is not None:
            self._told.add(self.segment)
            self._send((self.segment, self.memory))

    # The promises ------------------------------------------------------------------------------

    def check(self) -> None:
        """What must hold at every moment."""
        scheduler = self.scheduler
        capacity, slots = scheduler.capacity, list(scheduler.slots)
        assert len(slots) <= capacity.count, "more weights than asked for"
        used = sum(slot.size_bytes for slot in slots)
        assert used <= capacity.size_bytes, "more bytes than asked for"
        assert scheduler.arena.free_bytes == capacity.size_bytes - used
        end = 0
        for slot in sorted(slots, key=lambda slot: slot.offset_bytes):
            assert slot.offset_bytes >= end and slot.offset_bytes % 512 == 0, "slots overlap"
            assert slot.size_bytes >= self.sizes[slot.weight]
            end = slot.offset_bytes + slot.size_bytes
        assert end <= capacity.size_bytes
        by_id = {slot.id: slot for slot in slots}
        assert len(by_id) == len(slots)
        for grant in self.lent.values():
            slot = by_id[grant.slot]
            assert slot.state in HELD, "taken from the engine"
            found = (slot.weight, slot.generation, slot.offset_bytes)
            assert found == (grant.weight, grant.generation, grant.offset_bytes)
        assert {slot.id for slot in slots if slot.state in HELD} == self.lent.keys()
        for fill in self.fills:
            slot = by_id[fill.slot]
            assert slot.state is State.FILLING, "taken from a fill"
            assert (slot.weight, slot.offset_bytes) == (fill.weight, fill.offset_bytes)
        assert sum(slot.state is State.FILLING for slot in slots) == len(self.fills)
        assert scheduler.counters.ignored == self.stale

    def situation(self) -> str:
        states = {s.weight: s.state.value for s in self.scheduler.slots}
        needed = self.engine.needed if self.engine else None
        return f"engine waits for {needed}; {states}; {self.scheduler.capacity}; sizes {self.sizes}"
