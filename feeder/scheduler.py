"""Decides what happens to slots. Pure: no torch, no zmq, no clock.

Events go in (``need``, ``released``, ``filled`` …), commands come out of ``step``. The feeder executes
them with real copies and messages, the simulator with a clock of its own, the property tests with
neither; all three run this very object.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from heapq import merge

from common.errors import InternalError
from common.plan import Capacity, Plan
from common.slots import HELD, Event, Slot, SlotTable, State
from feeder.arena import Arena, aligned
from feeder.ranked import FIRST, Ranked, weight_of
from feeder.strategies.base import Strategy
from feeder.strategies.cyclic import Cyclic
from feeder.strategies.on_demand import OnDemand
from feeder.target import NOTHING, Listed, Target, Window

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


#: What a strategy is told of, if it has a method for it.
_EVENTS = ("needed", "released", "filled", "freed")


class _Index:
    """Which weights there may be something to do about, so that nobody looks at the others."""

    def __init__(self) -> None:
        #: Wanted and in no slot; those that stream, and those that stay. Most urgent first.
        self.missing = (Ranked(), Ranked())
        #: Wanted and READY.
        self.grantable: set[int] = set()
        #: May make room: READY, or IN_USE. Oldest first.
        self.ready, self.lent = Ranked(), Ranked()

    def remove(self, weight: int) -> None:
        self.grantable.discard(weight)
        for ranked in (*self.missing, self.ready, self.lent):
            ranked.discard(weight)

    def next_missing(self, passed: int, stuck: Container[bool]) -> int | None:
        """The key of the most urgent one after the key ``passed``, but for the stuck regions."""
        streams, stays = self.missing
        one = streams.after(passed) if streams and False not in stuck else None
        other = stays.after(passed) if stays and True not in stuck else None
        if one is None or other is None:
            return one if other is None else other
        return min(one, other)


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
        self._need: int | None = None  # the weight that the engine is blocked on
        self._position = 0
        self._misses = self._misses_ahead = 0  # fills for this pass, and for the next
        self._filling_bytes = self._filling_count = 0
        self._no_room = False  # a wish found no extent, and waits for others to move
        self._target: Target = NOTHING
        self._stale = True  # something has happened that may change the target
        self._window: Window | None = None  # the target of a cyclic strategy
        self._index = _Index()
        self._kept: frozenset[int] = frozenset()  # what the strategy keeps, checked
        self._keep = self._kept  # what slots have been laid out for
        self._keep_bytes = 0  # the region of what stays
        self._born: dict[int, int] = {}  # when each slot was filled, counted in fills
        self._revoked_bytes = 0
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
        self._listens = {
            n for n in _EVENTS if getattr(type(strategy), n) is not getattr(Strategy, n)
        }
        self._window, self._target, self._stale = None, NOTHING, True
        self._guard(lambda: strategy.begin(self.plan, self.sizes, self.capacity))
        for slot in self.slots:
            if slot.state is not State.FILLING:
                self._tell("filled", slot.weight)

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
        self._stale = True
        self._set_need(None)
        for slot in list(self.slots):
            if slot.state in HELD:
                self.slots.apply(slot, Event.LOSE)
                self.slots.apply(slot, Event.RECOVER)
                self._touch(slot.weight)
        self._revoked_bytes = 0

    def need(self, weight: int) -> None:
        """The engine is blocked on ``weight``. Served before anything else."""
        self.counters.needs += 1
        self._set_need(None)  # it waits for one weight at a time: the last one has reached it
        slot = self.slots.get(weight)
        if slot is not None and slot.state is State.IN_USE:
            return  # the grant is on its way: the two messages crossed
        if slot is None:
            self._follow()
            if weight not in self._target.members:
                self._move_to(self.plan.position(weight))
        self._set_need(weight)
        self._tell("needed", weight)

    def released(self, slot_id: int, generation: int) -> None:
        """The engine's kernels are done with this grant. A stale one is counted, never obeyed."""
        slot = self.slots.held(slot_id, generation)
        if slot is None:
            self.counters.ignored += 1
            return
        given_back_unused = slot.state is State.REVOKED
        self.slots.apply(slot, Event.RELEASE)
        self._touch(slot.weight)
        self.counters.releases += 1
        if given_back_unused:
            self._revoked_bytes -= slot.size_bytes
        else:
            self._move_to(self.plan.after(slot.weight))
            self._tell("released", slot.weight)

    def filled(self, slot_id: int) -> None:
        """The fill of the slot is complete on the device."""
        slot = self.slots.by_id(slot_id)
        self.slots.apply(slot, Event.FILLED)
        self._filling_bytes -= slot.size_bytes
        self._filling_count -= 1
        self._touch(slot.weight)
        self._tell("filled", slot.weight)

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
        self._follow()
        if self._kept is not self._keep:
            self._change_keep(commands)
        self._fill(commands)
        if self.attached:
            self._grant(commands)
        return commands

    def upcoming(self, limit_bytes: int, packed_sizes: Sequence[int]) -> list[int]:
        """The weights that will be filled next: what is wanted and in no slot yet, then what the
        strategy goes on with, for as long as their ``packed_sizes`` come to ``limit_bytes``."""
        if self._draining:
            return []
        self._follow()
        found, room = [], limit_bytes
        for weight in self._next():
            room -= packed_sizes[weight]
            if room < 0:
                break
            found.append(weight)
        # A strategy that failed while it was asked has been replaced.
        return self.upcoming(limit_bytes, packed_sizes) if self._stale else found

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
        if self._draining or self._filling_count or self._revoked_bytes:
            return False
        self._follow()
        return self._no_room or not any(self._index.missing)

    # The target --------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Bring the target, and the index of who is in it, up to date."""
        while self._stale:  # a strategy that fails while it is asked is replaced
            self._stale = False
            if not self._follow_window():
                self._ask()

    def _follow_window(self) -> bool:
        """Without asking a cyclic strategy; False if it must be asked."""
        strategy, window = self._strategy, self._window
        if type(strategy).wanted is not Cyclic.wanted or "wanted" in vars(strategy):
            return False
        changed = None
        if window is None or window.keep is not self._kept:
            window = Window(self.plan, self.sizes, self.capacity, self._kept, self._position)
            self._window = window
        elif window.usable:
            changed = window.move(self._position)
        need = self._need
        if not window.usable or not (need is None or need in window.members):
            self._target = NOTHING  # the window has moved without it
            return False
        if changed is None or self._target is not window:
            self._target = window
            self._touch_all()
        else:
            for weight in changed:
                self._touch(weight)
        return True

    def _ask(self) -> None:
        former = self._target
        self._target = target = Listed(self._wishes(), self.sizes, self.capacity)
        self._guard(lambda: None)  # it may have changed its mind on what stays
        if former is NOTHING or isinstance(former, Window):
            self._touch_all()
            return
        for weight in former.members.keys() ^ target.members.keys():
            self._touch(weight)
        for missing in self._index.missing:
            for weight in list(missing):
                self._touch(weight)

    def _set_need(self, weight: int | None) -> None:
        former, self._need = self._need, weight
        if former != weight:
            self._stale = True
            for changed in (former, weight):
                if changed is not None:
                    self._touch(changed)

    def _rank(self, weight: int) -> int:
        return -1 if weight == self._need else self._target.rank(weight)

    def _touch(self, weight: int) -> None:
        """Something about the weight has changed: its slot, or whether it is wanted."""
        index, slot = self._index, self.slots.get(weight)
        wanted = weight in self._target.members
        if slot is None:
            index.remove(weight)
            if wanted:
                index.missing[weight in self._keep].put(weight, self._rank(weight))
            return
        index.missing[weight in self._keep].discard(weight)
        state = slot.state
        ready, lent = state is State.READY, state is State.IN_USE
        if ready and wanted:
            index.grantable.add(weight)
        else:
            index.grantable.discard(weight)
        # A need may lie anywhere until it is granted.
        dispensable = weight != self._need and (not wanted or self._misplaced(slot))
        if ready and dispensable:
            index.ready.put(weight, self._born[weight])
        else:
            index.ready.discard(weight)
        if lent and dispensable:
            index.lent.put(weight, self._born[weight])
        else:
            index.lent.discard(weight)

    def _touch_all(self) -> None:
        self._index = _Index()
        for weight in self._target.members:
            self._touch(weight)
        for slot in self.slots:
            self._touch(slot.weight)

    def _next(self) -> Iterator[int]:
        yield from map(weight_of, merge(*(missing.keys for missing in self._index.missing)))
        for weight in self._target.beyond():
            if self.slots.get(weight) is None:
                yield weight

    def _wishes(self) -> Iterator[int]:
        if self._need is not None:
            yield self._need
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

    # What is done about it ---------------------------------------------------------------------

    def _fill(self, commands: list[Command]) -> None:
        self._no_room = False
        index, passed = self._index, FIRST
        stuck: set[bool] = set()  # regions (of what stays, or not) where a wish waits for room
        while (key := index.next_missing(passed, stuck)) is not None:
            passed, weight = key, weight_of(key)
            if weight != self._need and self._filling_count >= 2:
                if self._filling_count >= FILL_AHEAD_COUNT:
                    return
                if self._filling_bytes >= FILL_AHEAD_BYTES:
                    return
            offset = self._make_room(weight, commands)
            if offset is None:
                self._no_room = True
                stuck.add(weight in self._keep)
                if weight == self._need or len(stuck) == 2:
                    return
                continue  # in its region the order is kept; the other need not wait for it
            slot = self.slots.fill(weight, offset, self.sizes[weight])
            self.counters.fills += 1
            self._born[weight] = self.counters.fills
            self._touch(weight)
            commands.append(Fill(slot.id, weight, offset))
            self._count_miss(weight)
            self._filling_bytes += slot.size_bytes
            self._filling_count += 1
            if self._stale:  # the strategy was told what was evicted for it
                self._follow()
                index, passed = self._index, FIRST
                stuck.clear()

    def _make_room(self, weight: int, commands: list[Command]) -> int | None:
        """An extent for ``weight``: evicts what is not wanted, or asks for it back and gives None."""
        offset = self._place(weight)
        if offset is not None:
            return offset
        index, size = self._index, self.sizes[weight]
        while index.ready:
            self._evict(index.ready.first())
            offset = self._place(weight)
            if offset is not None:
                return offset
        while index.lent and self._revoked_bytes < size:
            commands.append(self._revoke(index.lent.first()))
        if weight != self._need:
            return None
        # A need comes before every wish; the last wish goes first.
        members = self._target.members
        wishes = [w for w in members if w != weight and self.slots.get(w) is not None]
        for wish in sorted(wishes, key=self._rank, reverse=True):
            slot = self.slots.get(wish)
            assert slot is not None
            if slot.state is State.IN_USE and self._revoked_bytes < size:
                commands.append(self._revoke(wish))
            elif slot.state is State.READY:
                self._evict(wish)
                offset = self._place(weight)
                if offset is not None:
                    return offset
        return None

    def _place(self, weight: int) -> int | None:
        """In the region of what stays or of what streams; a weight that is needed, anywhere."""
        if len(self.slots) >= self.capacity.count:
            return None
        size, border = self.sizes[weight], self._keep_bytes
        if weight in self._keep:
            offset = self.arena.allocate(size, ceiling=border)
        else:
            offset = self.arena.allocate(size, floor=border)
        if offset is None and weight == self._need:
            offset = self.arena.allocate(size)
        return offset

    def _misplaced(self, slot: Slot) -> bool:
        """In the wrong region: it was filled under another strategy, or could not wait."""
        if slot.weight in self._keep:
            return slot.offset_bytes + slot.size_bytes > self._keep_bytes
        return slot.offset_bytes < self._keep_bytes

    def _evict(self, weight: int) -> None:
        slot = self.slots.get(weight)
        assert slot is not None
        if self._on_evict is not None:
            self._on_evict(slot)
        self.arena.free(slot.offset_bytes)
        self.slots.apply(slot, Event.EVICT)
        del self._born[weight]
        self._touch(weight)
        self._tell("freed", weight)

    def _revoke(self, weight: int) -> Revoke:
        slot = self.slots.get(weight)
        assert slot is not None
        self.slots.apply(slot, Event.REVOKE)
        self._revoked_bytes += slot.size_bytes
        self._touch(weight)
        self.counters.revokes += 1
        return Revoke(slot.id, slot.generation)

    def _change_keep(self, commands: list[Command]) -> None:
        """Other weights stay. A standing grant tells nothing of the engine's progress, so a weight
        that does not stay any longer is asked back, to be granted in the ordinary way."""
        self._keep = self._kept
        self._keep_bytes = sum(self.sizes[w] for w in self._keep)
        self._touch_all()
        for slot in list(self.slots):
            if slot.standing and slot.state is State.IN_USE and slot.weight not in self._keep:
                commands.append(self._revoke(slot.weight))

    def _grant(self, commands: list[Command]) -> None:
        self._follow()  # evictions may have changed it
        for weight in sorted(self._index.grantable, key=self._rank):
            slot = self.slots.get(weight)
            assert slot is not None
            self.slots.grant(slot, standing=weight in self._keep)
            if weight == self._need:
                self._need = None
            self._touch(weight)
            self.counters.grants += 1
            grant = Grant(slot.id, slot.generation, weight, slot.offset_bytes, slot.standing)
            commands.append(grant)

    def _drain(self) -> Iterator[Command]:
        for slot in list(self.slots):
            if slot.state is State.READY:
                self._evict(slot.weight)
            elif slot.state is State.IN_USE:
                yield self._revoke(slot.weight)

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
            self._stale = True

    def _count_miss(self, weight: int) -> None:
        here = self.plan.position(weight)
        if here is not None and here < self._position:
            self._misses_ahead += 1
        else:
            self._misses += 1

    def _tell(self, event: str, weight: int) -> None:
        if event in self._listens:
            self._stale = True
            self._guard(lambda: getattr(self._strategy, event)(weight))

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
