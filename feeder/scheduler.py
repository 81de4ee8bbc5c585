"""Decides what happens to slots. Pure: no torch, no zmq, no clock.

Events go in (``need``, ``released``, ``filled`` …), commands come out of ``step``. The feeder executes
them with real copies and messages, the simulator with a clock of its own, the property tests with
neither; all three run this very object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from common.errors import InternalError
from common.plan import Capacity, Plan
from common.slots import HELD, Event, Slot, SlotTable, State
from feeder.advisor import Advisor
from feeder.agenda import Agenda
from feeder.arena import Arena, aligned
from feeder.ranked import FIRST, weight_of
from feeder.strategies.base import Strategy
from feeder.strategies.on_demand import OnDemand
from feeder.target import NOTHING, Listed, Recent, Window

#: Bytes of slots that may be on their way over the link at once. Enough to keep it busy across the feeder's
#: own latency; little enough that a weight nobody foresaw does not wait behind a long queue. A fill from a
#: copy on the device takes a twentieth of the time: of those as many are begun as there are slots, up to one
#: that has to wait for the link, since two processes take turns on the device, and a turn should be worth it.
FILL_AHEAD_BYTES = 768 << 20
FILL_AHEAD_COUNT = 8
#: How far ahead of the slots is looked for what may be copied.
LOOK_AHEAD_COUNT = 64


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
    ``copies``: weights of which a packed copy is or will be on the device; ``link_bytes``: what a fill of
    each weight brings over the link now, which may change; None: something.
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
        copies: frozenset[int] = frozenset(),
        link_bytes: list[int] | None = None,
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
        self._position = 0
        self.copies, self.link_bytes = copies, link_bytes
        self._misses = self._misses_ahead = 0  # fills for this pass, and for the next
        self._filling_count = 0
        self._crossing: dict[int, int] = {}  # fills on the link: bytes of the slot, by its id
        self._no_room = False  # a wish found no extent, and waits for others to move
        self._revoked_bytes = 0
        self._agenda = Agenda(self.slots)
        self._stale = True  # something has happened that may change the target
        self._told: list[int] = []  # what the strategy was told of since the target was followed
        self._window: Window | None = None  # the target of a cyclic strategy
        self._on_fallback, self._on_evict = on_fallback, on_evict
        self._advisor = Advisor(strategy, self._fall_back)
        self.set_strategy(strategy)

    # Events ------------------------------------------------------------------------------------

    @property
    def strategy(self) -> Strategy:
        return self._advisor.strategy

    def set_strategy(self, strategy: Strategy) -> None:
        """Replace the strategy between two weights; what lies in slots stays until it is in the way."""
        self._window, self._agenda.target, self._stale = None, NOTHING, True
        self._advisor.begin(strategy, self.plan, self.sizes, self.capacity, self.copies)
        for slot in self.slots:
            if slot.state is not State.FILLING:
                self._tell("filled", slot.weight)

    def set_plan(self, plan: Plan) -> None:
        """The order has been learned. Weights it does not name are still served when needed."""
        if plan != self.plan:
            self.plan = plan
            self._move_to(0)
            self.set_strategy(self.strategy)

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
                self._agenda.touch(slot.weight)
        self._revoked_bytes = 0

    def need(self, weight: int) -> None:
        """The engine is blocked on ``weight``. Served before anything else."""
        self.counters.needs += 1
        self._set_need(None)  # it waits for one weight at a time: the last one has reached it
        slot = self.slots.get(weight)
        if slot is not None and slot.state is State.IN_USE:
            return  # the grant is on its way: the two messages crossed
        self._move_to(self.plan.position(weight))  # so that what comes before it makes room for it
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
        self._agenda.touch(slot.weight)
        self.counters.releases += 1
        if given_back_unused:
            self._revoked_bytes -= slot.size_bytes
        else:
            self._move_to(self.plan.after(slot.weight), ahead=True)
            self._tell("released", slot.weight)

    def filled(self, slot_id: int) -> None:
        """The fill of the slot is complete on the device."""
        slot = self.slots.by_id(slot_id)
        self.slots.apply(slot, Event.FILLED)
        self._crossing.pop(slot_id, None)
        self._filling_count -= 1
        self._agenda.touch(slot.weight)
        self._tell("filled", slot.weight)

    def drain(self) -> None:
        """From now on fill nothing and take everything back, until ``drained``; then ``resize``."""
        self._draining = True

    @property
    def drained(self) -> bool:
        return self._draining and not len(self.slots)

    def resize(
        self,
        capacity: Capacity,
        strategy: Strategy,
        sizes: Sequence[int] | None = None,
        copies: frozenset[int] = frozenset(),
    ) -> None:
        """Go on with an arena of another size, weights of other ``sizes`` and other ``copies``. Only when
        ``drained``."""
        if not self.drained:
            raise InternalError("the arena can be resized only when every slot is free")
        if sizes is not None:
            self.sizes = tuple(aligned(size) for size in sizes)
        self.capacity, self.copies = capacity, copies
        self.arena = Arena(capacity.size_bytes)
        self._draining = False
        self._agenda.set_keep(frozenset(), self.sizes)
        self.set_strategy(strategy)

    # Decisions ---------------------------------------------------------------------------------

    def step(self) -> list[Command]:
        """Everything that can be done now. Call it after events, execute what it returns, in order."""
        if self._draining:
            return list(self._drain())
        commands: list[Command] = []
        self._follow()
        if self._advisor.kept is not self._agenda.keep:
            self._change_keep(commands)
        self._fill(commands)
        if self.attached:
            self._grant(commands)
        return commands

    def upcoming(self, limit_bytes: int, link_bytes: Sequence[int]) -> list[int]:
        """The weights that will be filled next: what is wanted and in no slot yet, then what the
        strategy goes on with, for as long as their ``link_bytes`` come to ``limit_bytes`` and they
        are not more than LOOK_AHEAD_COUNT."""
        if self._draining:
            return []
        self._follow()
        found, room = [], limit_bytes
        for weight in islice(self._agenda.to_come(), LOOK_AHEAD_COUNT):
            room -= link_bytes[weight]
            if room < 0:
                break
            found.append(weight)
        # A strategy that failed while it was asked has been replaced.
        return self.upcoming(limit_bytes, link_bytes) if self._stale else found

    @property
    def kept(self) -> frozenset[int]:
        """The weights that stay."""
        return self._advisor.kept

    @property
    def needed(self) -> int | None:
        """The weight that the engine is blocked on, if it is."""
        return self._agenda.need

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
        return self._no_room or not any(self._agenda.missing)

    # The target --------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Bring the target, and the index of who is in it, up to date."""
        while self._stale:  # a strategy that fails while it is asked is replaced
            self._stale = False
            told, self._told = self._told, []
            if not self._follow_window() and not self._follow_recent(told):
                self._ask()

    def _follow_window(self) -> bool:
        """Without asking a cyclic strategy; False if it must be asked."""
        advisor, agenda, window = self._advisor, self._agenda, self._window
        if not advisor.cyclic:
            return False
        changed = None
        if window is None or window.keep is not advisor.kept:
            window = Window(self.plan, self.sizes, self.capacity, advisor.kept, self._position)
            self._window = window
        elif window.usable:
            changed = window.move(self._position)
        if not window.usable or not (agenda.need is None or agenda.need in window.members):
            agenda.target = NOTHING  # the window has moved without it
            return False
        agenda.set_target(window, changed if agenda.target is window else None)
        return True

    def _follow_recent(self, told: list[int]) -> bool:
        """The same for on-demand."""
        agenda, recent = self._agenda, self._advisor.recent
        if recent is None:
            return False
        target = agenda.target
        if isinstance(target, Recent):
            agenda.set_target(target, target.follow(told, agenda.need))
        else:
            agenda.set_target(Recent(recent, self.sizes, self.capacity, agenda.need), None)
        return True

    def _ask(self) -> None:
        agenda, former = self._agenda, self._agenda.target
        target = Listed(self._wishes(), self.sizes, self.capacity)
        self._advisor.look_again()
        if former is NOTHING or not isinstance(former, Listed):
            agenda.set_target(target, None)
        else:  # what is missing has other ranks, too
            missing = [weight for missing in agenda.missing for weight in missing]
            changed = former.members.keys() ^ target.members.keys()
            agenda.set_target(target, changed.union(missing))

    def _wishes(self) -> Iterator[int]:
        if self._agenda.need is not None:
            yield self._agenda.need
        yield from self._advisor.wishes(self._position)

    def _set_need(self, weight: int | None) -> None:
        if weight != self._agenda.need:
            self._stale = True
            self._agenda.set_need(weight)

    # What is done about it ---------------------------------------------------------------------

    def _fill(self, commands: list[Command]) -> None:
        self._no_room = False
        agenda, passed = self._agenda, FIRST
        stuck: set[bool] = set()  # regions (of what stays, or not) where a wish waits for room
        while (key := agenda.next_missing(passed, stuck)) is not None:
            passed, weight = key, weight_of(key)
            if weight != agenda.need and self._crosses(weight) and self._link_is_busy():
                return
            offset = self._make_room(weight, commands)
            if offset is None:
                self._no_room = True
                stuck.add(weight in agenda.keep)
                if weight == agenda.need or len(stuck) == 2:
                    return
                continue  # in its region the order is kept; the other need not wait for it
            slot = self.slots.fill(weight, offset, self.sizes[weight])
            self.counters.fills += 1
            agenda.begun(weight)
            commands.append(Fill(slot.id, weight, offset))
            self._filling_count += 1
            if self._crosses(weight):
                self._crossing[slot.id] = slot.size_bytes
                self._count_miss(weight)
            if self._stale:  # the strategy was told what was evicted for it
                self._follow()
                passed = FIRST
                stuck.clear()

    def _make_room(self, weight: int, commands: list[Command]) -> int | None:
        """An extent for ``weight``: evicts what is not wanted, or asks for it back and gives None."""
        offset = self._place(weight)
        if offset is not None:
            return offset
        agenda, size = self._agenda, self.sizes[weight]
        while agenda.ready.keys:
            self._evict(agenda.ready.first())
            offset = self._place(weight)
            if offset is not None:
                return offset
        while agenda.lent.keys and self._revoked_bytes < size:
            commands.append(self._revoke(agenda.lent.first()))
        if weight != agenda.need:
            return None
        for wish in agenda.wishes_in_slots():  # a need comes before every wish
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
        size, border = self.sizes[weight], self._agenda.keep_bytes
        if weight in self._agenda.keep:
            offset = self.arena.allocate(size, ceiling=border)
        else:
            offset = self.arena.allocate(size, floor=border)
        if offset is None and weight == self._agenda.need:
            offset = self.arena.allocate(size)
        return offset

    def _evict(self, weight: int) -> None:
        slot = self.slots.get(weight)
        assert slot is not None
        if self._on_evict is not None:
            self._on_evict(slot)
        self.arena.free(slot.offset_bytes)
        self.slots.apply(slot, Event.EVICT)
        self._agenda.touch(weight)
        self._tell("freed", weight)

    def _revoke(self, weight: int) -> Revoke:
        slot = self.slots.get(weight)
        assert slot is not None
        self.slots.apply(slot, Event.REVOKE)
        self._revoked_bytes += slot.size_bytes
        self._agenda.touch(weight)
        self.counters.revokes += 1
        return Revoke(slot.id, slot.generation)

    def _change_keep(self, commands: list[Command]) -> None:
        """Other weights stay. A standing grant tells nothing of the engine's progress, so a weight
        that does not stay any longer is asked back, to be granted in the ordinary way."""
        keep = self._advisor.kept
        self._agenda.set_keep(keep, self.sizes)
        for slot in list(self.slots):
            if slot.standing and slot.state is State.IN_USE and slot.weight not in keep:
                commands.append(self._revoke(slot.weight))

    def _grant(self, commands: list[Command]) -> None:
        self._follow()  # evictions may have changed it
        agenda = self._agenda
        if not agenda.grantable:
            return
        for weight in sorted(agenda.grantable, key=agenda.rank):
            slot = self.slots.get(weight)
            assert slot is not None
            self.slots.grant(slot, standing=weight in agenda.keep)
            if weight == agenda.need:
                agenda.need = None
            self._agenda.touch(weight)
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

    def _move_to(self, position: int | None, ahead: bool = False) -> None:
        """``ahead``: not back, as a late release would lead."""
        if position is None:
            return
        behind = (self._position - position) % len(self.plan)
        if ahead and 0 < 2 * behind < len(self.plan):
            return
        # Half a pass backwards, or more, is the next pass, not a late release.
        if 2 * (self._position - position) >= len(self.plan):
            self.counters.passes += 1
            self.counters.hit_rate = max(0.0, 1 - self._misses / len(self.plan))
            self._misses, self._misses_ahead = self._misses_ahead, 0
        if position != self._position:
            self._position = position
            self._stale = True

    def _crosses(self, weight: int) -> bool:
        """Whether a fill of the weight, begun now, crosses the link."""
        return self.link_bytes is None or self.link_bytes[weight] > 0

    def _link_is_busy(self) -> bool:
        crossing = self._crossing
        if len(crossing) < 2:
            return False
        return len(crossing) >= FILL_AHEAD_COUNT or sum(crossing.values()) >= FILL_AHEAD_BYTES

    def _count_miss(self, weight: int) -> None:
        here = self.plan.position(weight)
        if here is not None and here < self._position:
            self._misses_ahead += 1
        else:
            self._misses += 1

    def _tell(self, event: str, weight: int) -> None:
        if self._advisor.tell(event, weight):
            self._stale = True
            self._told.append(weight)

    def _fall_back(self, text: str) -> None:
        self._on_fallback(text)
        self.set_strategy(OnDemand())
