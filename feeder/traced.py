"""A feeder that also writes down what it does: the same loop, with a note at each turning point."""

from __future__ import annotations

from typing import Any

from common import protocol as p
from common.slots import HELD, State
from common.trace import INTERVAL_S, Args, Tracer, now
from feeder.recorder import Recorder
from feeder.scheduler import Fill, Grant
from feeder.serve import Feeder

ROWS = ("link", "dequantize", "messages", "strategy")


class TracedFeeder(Feeder):
    """``recorder``: the filler's own."""

    def __init__(self, tracer: Tracer, recorder: Recorder, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._tracer, self._recorder = tracer, recorder
        self._begun: dict[int, int] = {}  # when a fill was begun, by slot
        self._counted: Args = {}
        self._names = [entry.name for entry in self._store.weights]
        self._strategy_since = (now(), self._strategy_now())

    def close(self) -> None:
        super().close()
        self._recorder.close()
        self._note_strategy(None)

    def _patience_s(self) -> float | None:
        self._recorder.collect()
        self._tracer.flush_if_due()
        patience = super()._patience_s()
        if self._tracer.waiting:  # for others, and none may come
            return INTERVAL_S if patience is None else min(patience, INTERVAL_S)
        return patience

    def _execute(self) -> None:
        super()._execute()
        at = now()
        counts = dict.fromkeys(State, 0)
        for slot in self.scheduler.slots:
            counts[slot.state] += 1
        values = {
            "filling": counts[State.FILLING],
            "ready": counts[State.READY],
            "in use": sum(counts[state] for state in HELD),
            "free": self.scheduler.capacity.count - len(self.scheduler.slots),
        }
        if values != self._counted:
            self._counted = values
            self._tracer.counter("feeder: slots", at, values)
        strategy = self._strategy_now()
        if strategy != self._strategy_since[1]:
            self._note_strategy(strategy)

    def _fill(self, fill: Fill) -> None:
        self._begun[fill.slot] = now()
        super()._fill(fill)

    def _filled(self, slot: int) -> None:
        at = now()
        super()._filled(slot)
        args = {"weight": self._names[self.scheduler.slots.by_id(slot).weight], "slot": slot}
        self._tracer.overlapping("fill", self._begun.pop(slot), at, args)

    def _grant(self, grant: Grant) -> None:
        at = now()  # before it is sent: the engine may read it at once
        super()._grant(grant)
        args = {"weight": self._names[grant.weight], "slot": grant.slot}
        args |= {"generation": grant.generation, "standing": grant.standing}
        self._tracer.instant("messages", "grant", at, args)

    def _from_engine(self, message: p.Message) -> None:
        at = now()
        super()._from_engine(message)
        match message:
            case p.Release(slots, generations):
                for slot, generation in zip(slots, generations, strict=True):
                    args = {"slot": slot, "generation": generation}
                    self._tracer.instant("messages", "release", at, args)
            case p.Need(weight) if weight < len(self._names):
                self._tracer.instant("messages", "need", at, {"weight": self._names[weight]})

    def _strategy_now(self) -> tuple[str, str]:
        return self.scheduler.strategy.name, str(self.slots.cache)

    def _note_strategy(self, after: tuple[str, str] | None) -> None:
        """A strategy's time ends."""
        since, (name, cache) = self._strategy_since
        at = now()
        self._tracer.span("strategy", f"{name}, --cache {cache}", since, at, {})
        if after is not None:
            args = {"strategy": after[0], "cache": after[1]}
            self._tracer.instant("strategy", "swap", at, args)
            self._strategy_since = (at, after)
