"""Decides what happens to slots. Pure: no torch, no zmq, no clock.

Events go in (``need``, ``released``, ``filled`` …), commands come out of ``step``. The feeder executes
them with real copies and messages, the simulator with a clock of its own, the property tests with
neither; all three run this very object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from common.errors import InternalError
from common.plan import Capacity, Plan
from common.slots import HELD, Event, Slot, SlotTable, State
from feeder.arena import Arena, aligned
from feeder.strategies.base import Strategy
from feeder.strategies.on_demand import OnDemand

#: Bytes of slots that may be on their way at once. Enough to keep the link busy across the feeder's
#: own latency; little enough that a weight nobody foresaw does not wait behind a long queue.
FILL_AHEAD_BYTES = 768 << 20
FILL_AHEAD_COUNT = 8


@dataclass(frozen=True)
class Fill:
    """Copy ``weight`` into the slot, then call ``Scheduler.filled``."""

    slot: int
    weight: int
    offset_bytes: int


@dataclass(frozen=True)
class Grant:
    """Tell the engine that it may read the slot."""

    slot: int
    generation: int
    weight: int
    offset_bytes: int
    standing: bool


@dataclass(frozen=True)
class Revoke:
    """Ask the engine to give the slot back."""

    slot: int
    generation: int


Command = Fill | Grant | Revoke


@dataclass
class Counters:
    """What happened since the start. ``hit_rate``: of the last whole pass, uses that crossed no link."""

    fills: int = 0
    grants: int = 0
    releases: int = 0
    revokes: int = 0
    needs: int = 0
    ignored: int = 0
    passes: int = 0
    hit_rate: float = 0.0


class Scheduler:
    """Slots, arena and strategy of one feeder.

    ``sizes``: bytes of each weight in a slot, by weight. The arena must hold the largest.
    ``on_fallback`` is told, in one line, why a strategy was replaced by ``on-demand``;
    ``on_evict`` gets each slot just before it is freed.
    """

    def __init__(
        self,
        plan: Plan,
        sizes: Sequence[int],
        capacity: Capacity,
        strategy: Strategy,
        first_generation: int = 0,
        on_fallback: Callable[[str], None] = lambda text: None,
        on_evict: Callable[[Slot], None] | None = None,
    ) -> None:
        self.sizes = tuple(aligned(size) for size in sizes)  # strategies see it: not to be changed
        if capacity.size_bytes < max(self.sizes):
            raise InternalError(f"{capacity} does not hold the largest weight")
        self.plan, self.capacity = plan, capacity
        self.slots = SlotTable(first_generation)
        self.arena = Arena(capacity.size_bytes)
        self.counters = Counters()
        self.attached = False
        self._draining = False
        self._needs: dict[int, None] = {}  # an ordered set
        self._position = 0
        self._misses = self._misses_ahead = 0  # fills for this pass, and for the next
        self._filling_bytes = self._filling_count = 0
        self._no_room = False  # a wish found no extent, and waits for others to move
        self._wanted_now: dict[int, None] | None = None  # the target, until something changes it
        self._kept: frozenset[int] = frozenset()  # what the strategy keeps, checked
        self._keep = self._kept  # what slots have been laid out for
        self._keep_bytes = 0  # the region of what stays
        self._on_fallback, self._on_evict = on_fallback, on_evict
        self._strategy = strategy
        self.set_strategy(strategy)

    # Events ------------------------------------------------------------------------------------

    @property
    def strategy(self) -> Strategy:
        return self._strategy

    def set_strategy(self, strategy: Strategy) -> None:
        """Replace the strategy between two weights; what lies in slots stays until it is in the way."""
        self._strategy = strategy
        self._wanted_now = None
        self._guard(lambda: strategy.begin(self.plan, self.sizes, self.capacity))
        for slot in self.slots:
            if slot.state is not State.FILLING:
                self._tell(Strategy.filled, slot.weight)

    def set_plan(self, plan: Plan) -> None:
        """The order has been learned. Weights it does not name are still served when needed."""
        if plan != self.plan:
            self.plan = plan
            self._move_to(0)
            self.set_strategy(self._strategy)

    def attach(self) -> None:
        """An engine is there: what is ready is granted to it from now on."""
        self.attached = True
        self._move_to(0)

    def detach(self) -> None:
        """The engine is gone for good (its kernels too): every slot it held is ready again."""
        self.attached = False
        self._needs.clear()
        self._wanted_now = None
        for slot in list(self.slots):
            if slot.state in HELD:
                self.slots.apply(slot, Event.LOSE)
                self.slots.apply(slot, Event.RECOVER)

    def need(self, weight: int) -> None:
        """The engine is blocked on ``weight``. Served before anything else."""
        self.counters.needs += 1
        if self._needs:  # it waits for one weight at a time: the last one has reached it
            self._needs.clear()
            self._wanted_now = None
        slot = self.slots.get(weight)
        if slot is not None and slot.state is State.IN_USE:
            return  # the grant is on its way: the two messages crossed
        if slot is None and weight not in self._target():
            self._move_to(self.plan.position(weight))
        self._needs[weight] = None
        self._wanted_now = None
        self._tell(Strategy.needed, weight)

    def released(self, slot_id: int, generation: int) -> None:
        """The engine's kernels are done with this grant. A stale one is counted, never obeyed."""
        slot = self.slots.held(slot_id, generation)
        if slot is None:
            self.counters.ignored += 1
            return
        given_back_unused = slot.state is State.REVOKED
        self.slots.apply(slot, Event.RELEASE)
        self.counters.releases += 1
        if not given_back_unused:
            self._move_to(self.plan.after(slot.weight))
            self._tell(Strategy.released, slot.weight)

    def filled(self, slot_id: int) -> None:
        """The fill of the slot is complete on the device."""
        slot = self.slots.by_id(slot_id)
        self.slots.apply(slot, Event.FILLED)
        self._filling_bytes -= slot.size_bytes
        self._filling_count -= 1
        self._tell(Strategy.filled, slot.weight)

    def drain(self) -> None:
        """From now on fill nothing and take everything back, until ``drained``; then ``resize``."""
        self._draining = True

    @property
    def drained(self) -> bool:
        return self._draining and not len(self.slots)

    def resize(
        self, capacity: Capacity, strategy: Strategy, sizes: Sequence[int] | None = None
    ) -> None:
        """Go on with an arena of another size, and weights of other ``sizes``. Only when ``drained``."""
        if not self.drained:
            raise InternalError("the arena can be resized only when every slot is free")
        if sizes is not None:
            self.sizes = tuple(aligned(size) for size in sizes)
        self.capacity = capacity
        self.arena = Arena(capacity.size_bytes)
        self._draining = False
        self._keep, self._keep_bytes = frozenset(), 0
        self.set_strategy(strategy)

    # Decisions ---------------------------------------------------------------------------------

    def step(self) -> list[Command]:
        """Everything that can be done now. Call it after events, execute what it returns, in order."""
        if self._draining:
            return list(self._drain())
        commands: list[Command] = []
        target = self._target()
        if self._kept is not self._keep:
            self._change_keep(commands)
        self._fill(target, commands)
        if self.attached:
            self._grant(self._target(), commands)
        return commands

    @property
    def hit_rate(self) -> float:
        """Of the last whole pass (or of now, if nothing moves), uses that crossed no link."""
        slots = (self.slots.get(weight) for weight in self.plan.order)
        if all(slot is not None and slot.standing for slot in slots):
            return 1.0
        return self.counters.hit_rate

    @property
    def full(self) -> bool:
        """Whether all that the strategy wants now, and that finds room, is in slots."""
        moving = (State.FILLING, State.REVOKED)
        if self._draining or any(slot.state in moving for slot in self.slots):
            return False
        return self._no_room or all(self.slots.get(weight) is not None for weight in self._target())

    def _target(self) -> dict[int, None]:
        """The longest prefix of needs and wishes that the capacity holds, as an ordered set."""
        if self._wanted_now is not None:
            return self._wanted_now
        target: dict[int, None] = {}
        count, room = self.capacity.count, self.capacity.size_bytes
        for weight in self._wishes():
            if weight in target:
                continue
            room -= self.sizes[weight]
            if len(target) == count or room < 0:
                break
            target[weight] = None
        self._guard(lambda: None)  # it may have changed its mind on what stays
        self._wanted_now = target
        return target

    def _wishes(self) -> Iterator[int]:
        yield from self._needs
        strategy, total = self._strategy, len(self.sizes)
        try:
            for answers, weight in enumerate(strategy.wanted(self._position)):
                if type(weight) is not int or not 0 <= weight < total:
                    raise ValueError(f"wanted {weight!r}, which is not a weight (0 to {total - 1})")
                if answers > 2 * total:
                    raise ValueError("wanted goes on without end")
                yield weight
        except Exception as error:
            self._fall_back(error)

    def _fill(self, target: dict[int, None], commands: list[Command]) -> None:
        self._no_room = False
        stuck: set[bool] = set()  # regions (of what stays, or not) where a wish waits for room
        for weight in target:
            stays = weight in self._keep
            if self.slots.get(weight) is not None or stays in stuck:
                continue
            if weight not in self._needs and self._filling_count >= 2:
                if self._filling_count >= FILL_AHEAD_COUNT:
                    return
                if self._filling_bytes >= FILL_AHEAD_BYTES:
                    return
            offset = self._make_room(weight, target, commands)
            if offset is None:
                self._no_room = True
                stuck.add(stays)
                if weight in self._needs or len(stuck) == 2:
                    return
                continue  # in its region the order is kept; the other need not wait for it
            slot = self.slots.fill(weight, offset, self.sizes[weight])
            commands.append(Fill(slot.id, weight, offset))
            self.counters.fills += 1
            self._count_miss(weight)
            self._filling_bytes += slot.size_bytes
            self._filling_count += 1
            if self._wanted_now is not target:  # the strategy was told what was evicted for it
                self._fill(self._target(), commands)
                return

    def _make_room(
        self, weight: int, target: dict[int, None], commands: list[Command]
    ) -> int | None:
        """An extent for ``weight``: evicts what is not wanted, or asks for it back and gives None."""
        if len(self.slots) < self.capacity.count:
            offset = self._allocate(weight)
            if offset is not None:
                return offset
        coming_bytes = sum(slot.size_bytes for slot in self.slots if slot.state is State.REVOKED)
        for slot in self._dispensable(weight, target):
            if slot.state is State.IN_USE and coming_bytes < self.sizes[weight]:
                commands.append(self._revoke(slot))
                coming_bytes += slot.size_bytes
            elif slot.state is State.READY:
                self._evict(slot)
                if len(self.slots) < self.capacity.count:
                    offset = self._allocate(weight)
                    if offset is not None:
                        return offset
        return None

    def _allocate(self, weight: int) -> int | None:
        """In the region of what stays or of what streams; a weight that is needed, anywhere."""
        size, border = self.sizes[weight], self._keep_bytes
        if weight in self._keep:
            offset = self.arena.allocate(size, ceiling=border)
        else:
            offset = self.arena.allocate(size, floor=border)
        if offset is None and weight in self._needs:
            offset = self.arena.allocate(size)
        return offset

    def _dispensable(self, weight: int, target: dict[int, None]) -> list[Slot]:
        """Slots that may make room for ``weight``, in the order in which they should."""
        needs = self._needs  # may lie anywhere until they are granted
        slots = [s for s in self.slots if s.weight not in needs]
        slots = [s for s in slots if s.weight not in target or self._misplaced(s)]
        slots.sort(key=lambda slot: slot.state is not State.READY)
        if weight in self._needs:  # a need comes before every wish, the last wish goes first
            wishes = (wish for wish in reversed(target) if wish not in self._needs)
            slots.extend(slot for wish in wishes if (slot := self.slots.get(wish)) is not None)
        return slots

    def _misplaced(self, slot: Slot) -> bool:
        """In the wrong region: it was filled under another strategy, or could not wait."""
        if slot.weight in self._keep:
            return slot.offset_bytes + slot.size_bytes > self._keep_bytes
        return slot.offset_bytes < self._keep_bytes

    def _evict(self, slot: Slot) -> None:
        weight = slot.weight
        if self._on_evict is not None:
            self._on_evict(slot)
        self.arena.free(slot.offset_bytes)
        self.slots.apply(slot, Event.EVICT)
        self._tell(Strategy.freed, weight)

    def _revoke(self, slot: Slot) -> Revoke:
        self.slots.apply(slot, Event.REVOKE)
        self.counters.revokes += 1
        return Revoke(slot.id, slot.generation)

    def _change_keep(self, commands: list[Command]) -> None:
        """Other weights stay. A standing grant tells nothing of the engine's progress, so a weight
        that does not stay any longer is asked back, to be granted in the ordinary way."""
        self._keep = self._kept
        self._keep_bytes = sum(self.sizes[w] for w in self._keep)
        for slot in self.slots:
            if slot.standing and slot.state is State.IN_USE and slot.weight not in self._keep:
                commands.append(self._revoke(slot))

    def _grant(self, target: dict[int, None], commands: list[Command]) -> None:
        for weight in target:
            slot = self.slots.get(weight)
            if slot is None or slot.state is not State.READY:
                continue
            self.slots.grant(slot, standing=weight in self._keep)
            self._needs.pop(weight, None)
            self.counters.grants += 1
            grant = Grant(slot.id, slot.generation, weight, slot.offset_bytes, slot.standing)
            commands.append(grant)

    def _drain(self) -> Iterator[Command]:
        for slot in list(self.slots):
            if slot.state is State.READY:
                self._evict(slot)
            elif slot.state is State.IN_USE:
                yield self._revoke(slot)

    # Helpers -----------------------------------------------------------------------------------

    def _move_to(self, position: int | None) -> None:
        if position is None:
            return
        # Half a pass backwards, or more, is the next pass, not a late release.
        if 2 * (self._position - position) >= len(self.plan):
            self.counters.passes += 1
            self.counters.hit_rate = max(0.0, 1 - self._misses / len(self.plan))
            self._misses, self._misses_ahead = self._misses_ahead, 0
        if position != self._position:
            self._position = position
            self._wanted_now = None

    def _count_miss(self, weight: int) -> None:
        here = self.plan.position(weight)
        if here is not None and here < self._position:
            self._misses_ahead += 1
        else:
            self._misses += 1

    def _tell(self, method: Callable[[Strategy, int], None], weight: int) -> None:
        name = method.__name__
        if getattr(type(self._strategy), name) is getattr(Strategy, name):
            return  # the strategy does not care
        self._wanted_now = None
        self._guard(lambda: getattr(self._strategy, name)(weight))

    def _guard(self, call: Callable[[], None]) -> None:
        try:
            call()
            keep = self._strategy.keep
            if keep is not self._kept:
                self._check_keep(keep)
                self._kept = keep
        except Exception as error:
            self._fall_back(error)

    def _check_keep(self, keep: object) -> None:
        if not isinstance(keep, frozenset):
            raise TypeError(f"keep must be a frozenset of weights, not {type(keep).__name__}")
        for weight in keep:
            if type(weight) is not int or not 0 <= weight < len(self.sizes):
                raise ValueError(f"keep holds {weight!r}, which is not a weight")

    def _fall_back(self, error: Exception) -> None:
        failed = self._strategy
        if type(failed) is OnDemand:
            raise InternalError(f"on-demand failed: {error!r}") from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        self._on_fallback(f"strategy {failed.name} failed ({reason}); going on with on-demand")
        self.set_strategy(OnDemand())
