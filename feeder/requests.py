"""What people ask of a running feeder: status, and a swap of strategy and cache. Answers take time.

A status waits a moment for the engine's own figures, since an engine may be stopped in a debugger. A
swap that needs another segment waits until the engine has given back every slot and unmapped the old
one; generation goes on as soon as the new one is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from common import protocol as p
from common.config import SLOTS, Cache
from common.errors import UsageError, WeightFeederError
from common.log import log
from feeder.budget import slot_formats
from feeder.plan_text import room_text
from feeder.scheduler import Scheduler
from feeder.slot_memory import SlotMemory
from feeder.strategies.base import Strategy
from feeder.strategies.registry import make_strategy

STATUS_PATIENCE_S = 0.3
_NAMES, _NAME_LENGTH = 100, 100  # of an engine's figures: ours must fit the message beside them

Reply = Callable[[bytes, p.Message], object]


class StatusRequests:
    """Who waits for a status, and until when."""

    def __init__(self, reply: Reply, fields: Callable[[], p.Fields]) -> None:
        self._reply, self._fields = reply, fields
        self._asking: list[tuple[bytes, float]] = []
        self._engine_asked = False

    def ask(self, peer: bytes, ask_engine: Callable[[], object] | None) -> None:
        """``ask_engine`` sends the engine a StatusRequest; None if there is no engine."""
        if ask_engine is None:
            self._reply(peer, p.Status(self._fields()))
            return
        if not self._engine_asked:  # a stopped engine is asked once, not once for each that asks us
            self._engine_asked = True
            ask_engine()
        self._asking.append((peer, time.monotonic() + STATUS_PATIENCE_S))

    def answered(self, fields: p.Fields) -> None:
        """The engine's figures are there."""
        self._engine_asked = False
        if not self._asking:
            return
        engine = {
            f"engine_{name[:_NAME_LENGTH]}": value[:_NAME_LENGTH] if type(value) is str else value
            for name, value in sorted(fields.items())[:_NAMES]
        }
        answer = p.Status(self._fields() | engine)
        for peer, _ in self._asking:
            self._reply(peer, answer)
        self._asking.clear()

    def overdue(self, everyone: bool) -> None:
        """Answer without the engine those who have waited long enough, or ``everyone`` if there is
        no engine."""
        self._engine_asked = self._engine_asked and not everyone
        now = time.monotonic()
        for peer, until in self._asking:
            if everyone or until <= now:
                self._reply(peer, p.Status(self._fields()))
        self._asking = [] if everyone else [a for a in self._asking if a[1] > now]

    def patience_s(self) -> float | None:
        """How long the loop may sleep on account of these."""
        if not self._asking:
            return None
        return max(0.0, min(until for _, until in self._asking) - time.monotonic()) + 0.001


@dataclass
class _Resize:
    """``carry_out`` makes the new segment, and answers whoever asked for it."""

    carry_out: Callable[[], Strategy]
    retiring: bool = False


class SwapRequests:
    """At most one new segment at a time. ``waiting``: one waits for the slots to come back."""

    def __init__(self, reply: Reply, scheduler: Scheduler, slots: SlotMemory) -> None:
        self._reply, self._scheduler, self._slots = reply, scheduler, slots
        self._resize: _Resize | None = None
        self._shrink: tuple[int, Callable[[int], object]] | None = None  # waits for a swap

    @property
    def waiting(self) -> bool:
        return self._resize is not None

    def ask(self, peer: bytes, swap: p.Swap) -> None:
        """Carry it out, begin to, or refuse it."""
        scheduler, slots = self._scheduler, self._slots
        try:
            if self._resize is not None:
                raise UsageError("the slots are being changed already: try again when that is done")
            now = scheduler.strategy
            cache = Cache.parse(swap.cache) if swap.cache else slots.cache
            strategy = make_strategy(swap.strategy or now.spec or now.name)
            if swap.slots not in ("", *SLOTS):
                raise UsageError(f"slots {swap.slots!r} found: expected {', '.join(SLOTS)}")
            kind = swap.slots or slots.slots
            formats = slot_formats(slots.store, kind, strategy)
            share = slots.fitting(strategy, cache, formats, instead=True)
        except WeightFeederError as error:
            self._reply(peer, p.Failure("swap", str(error)))
            return
        has, capacity = scheduler.capacity, share.capacity
        fits = capacity.count == has.count and capacity.size_bytes <= has.size_bytes
        copies = share.copies == slots.copies  # what is free varies: another set is no reason
        if strategy.spec == now.spec:
            copies = bool(share.copies) == bool(slots.copies)
        same = formats == slots.formats and copies and not swap.cache
        if same and (fits or cache.auto):
            slots.slots = kind
            scheduler.set_strategy(strategy)
            self._done(peer, strategy)
            return
        self._resize = _Resize(lambda: self._swap(peer, strategy, cache, kind, formats))
        scheduler.drain()

    def shrink(self, size_bytes: int, answer: Callable[[int], object]) -> None:
        """The engine is short of so many bytes. ``answer`` is told how many it got, 0 if none."""
        self._shrink = (size_bytes, answer)
        self._begin_shrink()

    def forget_engine(self) -> None:
        """Nobody waits for a shrink any more that has not begun."""
        self._shrink = None

    def _begin_shrink(self) -> None:
        if self._shrink is None or self._resize is not None:
            return
        (asked, answer), self._shrink = self._shrink, None
        spare = self._slots.spare_bytes(asked)
        if spare == 0:
            answer(0)
            return

        def carry_out() -> Strategy:
            self._slots.shrink(spare)
            answer(spare)
            return self._scheduler.strategy

        self._resize = _Resize(carry_out)
        self._scheduler.drain()

    def go_on(self, mapped: bool, retire: Callable[[], object]) -> bool:
        """Called when the loop has done its work: whether there is a new segment to export.

        ``mapped``: an engine still has the old one; ``retire`` tells it to unmap that.
        """
        resize = self._resize
        if resize is None or not self._scheduler.drained:
            return False
        if mapped:
            if not resize.retiring:
                resize.retiring = True
                retire()
            return False
        self._resize = None
        strategy = resize.carry_out()
        slots = self._slots
        self._scheduler.resize(slots.capacity, strategy, slots.sizes, slots.copies)
        self._begin_shrink()
        return True

    def _swap(
        self, peer: bytes, strategy: Strategy, cache: Cache, kind: str, formats: list[str]
    ) -> Strategy:
        refused = self._slots.replace(strategy, cache, kind, formats)
        if refused:
            self._reply(peer, p.Failure("memory", refused))
            return self._scheduler.strategy
        self._done(peer, strategy)
        return strategy

    def _done(self, peer: bytes, strategy: Strategy) -> None:
        room = room_text(self._slots.capacity, self._slots.sizes)
        text = f"strategy {strategy.name}, {room} of slots"
        log.info("swapped: %s", text)
        self._reply(peer, p.Done(text))
