"""What a feeder says of itself: flat figures by name, for ``status`` and for the engine's summary."""

from __future__ import annotations

import os
import time
from collections import deque

from common import protocol as p
from common.formats import PACKED
from common.model_map import MOST
from common.slots import State
from feeder.filler import Filler
from feeder.footprint import Footprint
from feeder.plan_text import room_text
from feeder.scheduler import Scheduler
from feeder.slot_memory import SlotMemory
from feeder.strategies.registry import BUILT_IN

WINDOW_S = 1.0
_LETTERS = {
    State.FILLING: "f", State.READY: "r", State.IN_USE: "u", State.REVOKED: "v",
}  # fmt: skip


class LinkMeter:
    """Bytes a second over the last second."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=4096)  # (clock, bytes so far)

    def add(self, streamed_bytes: int) -> None:
        self._samples.append((time.monotonic(), streamed_bytes))

    def bytes_per_s(self) -> float:
        """0 if nothing was streamed."""
        since = time.monotonic() - WINDOW_S
        recent = [sample for sample in self._samples if sample[0] >= since]
        if len(recent) < 2 or recent[-1][0] == recent[0][0]:
            return 0.0
        return (recent[-1][1] - recent[0][1]) / (recent[-1][0] - recent[0][0])


def weight_states(scheduler: Scheduler) -> str:
    """A character for each weight, see common/model_map.py; "" for more weights than have a map."""
    total = len(scheduler.sizes)
    if total > MOST:
        return ""
    found = ["."] * total
    for slot in scheduler.slots:
        found[slot.weight] = "s" if slot.standing else _LETTERS[slot.state]
    needed = scheduler.needed
    if needed is not None and found[needed] in ".f":
        found[needed] = "!"
    return "".join(found)


def status_fields(
    slots: SlotMemory,
    scheduler: Scheduler,
    filler: Filler,
    meter: LinkMeter,
    link_limit: float = 0.0,
) -> p.Fields:
    """The figures of now. docs/protocol.md says what each is. ``link_limit``: bytes a second that were
    measured, 0 if nothing was."""
    counters, store = scheduler.counters, slots.store
    states = dict.fromkeys((State.FILLING, State.READY, State.IN_USE, State.REVOKED), 0)
    for slot in scheduler.slots:
        states[slot.state] += 1
    return {
        "pid": os.getpid(),
        "store": str(store.path),
        "fingerprint": store.fingerprint,
        **({"method": store.method} if store.method else {}),
        **({"quality": str(store.quality)} if store.quality else {}),
        "packed_bytes": store.packed_bytes,
        "weights": len(store.weights),
        "device": slots.memory.identity,
        "dtype": str(slots.dtype).removeprefix("torch."),
        "strategy": scheduler.strategy.name,
        "cache": str(slots.cache),
        "draft": str(slots.draft.store.path) if slots.draft else "",
        "draft_bytes": slots.draft.size_bytes if slots.draft else 0,
        "packed_slots": slots.formats.count(PACKED),
        "slots": scheduler.capacity.count,
        "arena_bytes": scheduler.capacity.size_bytes,
        "room": room_text(scheduler.capacity, scheduler.sizes),
        "copies": len(slots.copies),
        "copies_bytes": slots.copies_bytes(slots.copies),
        **{f"slots_{state.value}": count for state, count in states.items()},
        "standing": sum(slot.standing for slot in scheduler.slots),
        "full": scheduler.full,
        "hit_rate": scheduler.hit_rate,
        "passes": counters.passes,
        "fills": counters.fills,
        "grants": counters.grants,
        "revokes": counters.revokes,
        "ignored": counters.ignored,
        "streamed_bytes": filler.streamed_bytes,
        "link_bytes_per_s": meter.bytes_per_s(),
        "link_limit_bytes_per_s": link_limit,
        "weight_states": weight_states(scheduler),
        "strategies": ",".join(BUILT_IN),
        "staging_bytes": filler.staging_bytes,
        **_beside(slots.footprint),
        "peak_bytes": slots.memory.peak_bytes(),
    }


def _beside(footprint: Footprint) -> p.Fields:
    """What both processes are planned to take beside the slots, part by part."""
    return {
        "planned_context_bytes": footprint.contexts,
        "planned_resident_bytes": footprint.residents,
        "planned_kv_cache_bytes": footprint.kv_cache,
        "planned_activation_bytes": footprint.activations,
        "planned_scratch_bytes": footprint.scratch,
        "planned_slack_bytes": footprint.slack,
        "planned_draft_bytes": footprint.draft_slots + footprint.draft_engine,
        "planned_tokens": footprint.tokens,
    }
