"""A clock for scheduler and strategy: what they would do on hardware that is known by a few figures.

Runs the very scheduler and strategy that serve: a link that carries one weight after the other, a device
whose kernels (the feeder's and the engine's) take turns, an engine that uses the weights in plan order.
Knows no files, no command line and no device; no torch, no zmq.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from common.blocks import packed_bytes
from feeder.scheduler import Fill, Grant, Revoke, Scheduler

#: What the filler copies at once, and dequantizes when it has arrived; larger weights go in pieces.
PIECE_BYTES = packed_bytes(144 << 20)
#: Host time of the engine for each weight in a dequantized slot: to launch its product and what lies
#: around it, to take it and to return it; and where all of them stay. Fitted, as are HANDOVER_US and TURN_US,
#: to an H100 with the 32B shape: python -m bench.forecast bench/results/sweep-32b.json.
ENGINE_US, STANDING_US = 85.0, 60.0
#: The same of a weight in a packed slot, by the fused step: six launches and seven weights a layer. An
#: estimate, not yet measured by itself.
STEP_US = 60.0
#: Of a pass over a prompt: transformers' own forward pass, with dequantized slots and with packed ones.
#: Measured on an H100 machine: 142 and 85 ms of a token of the 32B shape.
FORWARD_US, FORWARD_PACKED_US = 320.0, 190.0
#: From a fact on the device to the other process having acted on it.
HANDOVER_US = 300.0
#: From a kernel of one process to one of the other: without MPS they take turns on the device.
TURN_US = 60.0
#: What the filler copies ahead of the slots, packed.
STAGING_BYTES = 256 << 20
#: Of the bandwidth of a plain copy, what kernels reach. Measured on an H100, 27648 x 5120: the
#: dequantizer 2.80 and cuBLAS' product with one vector 2.38 of 3.03 TB/s.
DEQUANTIZE_SHARE, PRODUCT_SHARE = 0.92, 0.79
#: Of a whole token by the fused step, with all that is between its products: 16.5 GB in 7.27 ms.
FUSED_SHARE = 0.75
#: Up to so many tokens a product reads a packed weight as it is.
FUSED_TOKENS = 16
#: The steady state is there when a pass takes as long as the one before, to this share.
STEADY_SHARE, MOST_PASSES = 0.002, 8


def engine_us(packed: bool, everything: bool) -> float:
    """Host time of a CUDA engine for each weight, in slots that are ``packed`` or dequantized. With
    ``everything`` there to stay it is less, and packed there is none: a token is one launch of a CUDA
    graph."""
    if packed:
        return 0.0 if everything else STEP_US
    return STANDING_US if everything else ENGINE_US


def forward_us(packed: bool) -> float:
    """The same of a pass over a prompt."""
    return FORWARD_PACKED_US if packed else FORWARD_US


@dataclass(frozen=True)
class Hardware:
    """``link`` and ``device``: bytes a second; ``matmul``: floating-point operations a second.

    ``engine_s``, of a token, ``prompt_s``, of a prompt, and ``handover_s``: for each weight. ``turn_s``: from
    one process's kernel to the other's.
    ``staging_bytes``: packed bytes that may be copied before there is a slot for them. ``dequantize``:
    packed bytes a second where that is not a matter of device memory: on the CPU, which has a thread
    for fills; 0 elsewhere.
    """

    link: float
    device: float
    engine_s: float = ENGINE_US * 1e-6
    handover_s: float = HANDOVER_US * 1e-6
    matmul: float = float("inf")
    staging_bytes: int = STAGING_BYTES
    dequantize: float = 0.0
    prompt_s: float = FORWARD_US * 1e-6
    turn_s: float = TURN_US * 1e-6


@dataclass(frozen=True)
class Traffic:
    """Bytes by weight: ``packed`` cross the link, ``moved`` are read and written on the device to
    bring it into its slot. One use moves ``used`` there, one by more than FUSED_TOKENS tokens
    ``used_by_many``. ``flops``: of a use by one token."""

    packed: Sequence[int]
    moved: Sequence[int]
    used: Sequence[int]
    used_by_many: Sequence[int]
    flops: Sequence[int]

    @classmethod
    def of(
        cls, elements: Sequence[int], slots: Sequence[int], packed_slots: Collection[int] = ()
    ) -> Traffic:
        """``slots``: bytes of each weight in its slot; ``packed_slots``: weights that are packed
        there, and are dequantized for one use if many tokens share it."""
        packed = [packed_bytes(count) for count in elements]
        weights, aside = range(len(packed)), frozenset(packed_slots)
        return cls(
            packed=packed,
            moved=[0 if w in aside else packed[w] + slots[w] for w in weights],
            used=[packed[w] if w in aside else slots[w] for w in weights],
            used_by_many=[packed[w] + 4 * elements[w] if w in aside else slots[w] for w in weights],
            flops=[2 * count for count in elements],
        )


@dataclass(frozen=True)
class Steady:
    """What one token takes in the steady state. The three ``_s`` say how long each part is busy."""

    seconds: float
    hits: float
    streamed_bytes: float
    streamed: frozenset[int]
    link_s: float
    device_s: float
    host_s: float


class Simulation:
    """One feeder, one engine, one clock (seconds)."""

    def __init__(self, scheduler: Scheduler, traffic: Traffic, hardware: Hardware) -> None:
        self._scheduler, self._traffic, self._hardware = scheduler, traffic, hardware
        self._near: dict[int, float] = {}  # copies that are there, or will be, and when
        self._link_bytes = scheduler.link_bytes or list(traffic.packed)
        self._now = 0.0
        self._link_free = self._device_free = self._filler_free = 0.0
        self._events: list[tuple[float, int, str, int, int]] = []
        self._sequence = 0
        self._granted: dict[int, Grant] = {}
        self._coming: dict[int, Grant] = {}
        self._running: list[tuple[float, int, int]] = []  # kernel's end, slot, generation
        self._staged: dict[int, float] = {}  # copied ahead of its slot: when that is complete
        self._recalled: set[int] = set()  # slots to be given back when their weight has been used
        self._waiting = -1  # the weight that the engine cannot go on without
        self._turn = ""  # whose kernel ran last
        self.copied: list[int] = []  # weights that have crossed the link
        self.device_s = 0.0

    def attach(self) -> None:
        self._scheduler.attach()
        self._step()

    def run(self, passes: int, tokens: int = 1) -> float:
        """Seconds that ``passes`` passes of ``tokens`` tokens each take."""
        start = self._now
        for _ in range(passes):
            for weight in self._scheduler.plan.order:
                self._use(weight, tokens)
            self._advance(max(self._now, self._device_free))  # the next needs this one's token
        return self._now - start

    def idle(self) -> None:
        """The engine waits for a prompt; what is under way arrives."""
        while self._events:
            self._advance(self._events[0][0])

    def steady(self) -> Steady:
        """Run until one pass is as the other; that pass."""
        passes = 0
        seconds, copied = 0.0, -1
        while True:
            before, device_s, last = len(self.copied), self.device_s, (seconds, copied)
            seconds = self.run(1)
            copied = len(self.copied) - before
            passes += 1
            same = copied == last[1] and abs(seconds - last[0]) <= STEADY_SHARE * seconds
            if passes == MOST_PASSES or (passes > 2 and same):
                break
        weights = self.copied[before:]
        streamed_bytes = sum(self._traffic.packed[weight] for weight in weights)
        return Steady(
            seconds=seconds,
            hits=self._scheduler.hit_rate,
            streamed_bytes=streamed_bytes,
            streamed=frozenset(weights),
            link_s=streamed_bytes / self._hardware.link,
            device_s=self.device_s - device_s,
            host_s=self._hardware.engine_s * len(self._scheduler.plan),
        )

    # The engine --------------------------------------------------------------------------------

    def _use(self, weight: int, tokens: int) -> None:
        hardware = self._hardware
        self._waiting = weight
        self._advance(self._now + (hardware.engine_s if tokens == 1 else hardware.prompt_s))
        self._return([p for p in self._running if p[0] <= self._now])
        if weight not in self._granted:
            self._return(self._running)  # while it waits, the engine looks all the time
            self._at(self._now + hardware.handover_s, "needed", weight, 0)
        while weight not in self._granted:
            self._advance(self._events[0][0])
        grant, self._waiting = self._granted[weight], -1
        self._device_free = max(self._now, self._device_free)
        self._compute("engine", self._use_s(weight, tokens))
        if hardware.dequantize:  # on the CPU who launches also computes
            self._advance(self._device_free)
        if not grant.standing or grant.slot in self._recalled:
            self._recalled.discard(grant.slot)
            del self._granted[weight]
            self._running.append((self._device_free, grant.slot, grant.generation))

    def _use_s(self, weight: int, tokens: int) -> float:
        traffic, hardware = self._traffic, self._hardware
        moved = traffic.used if tokens <= FUSED_TOKENS else traffic.used_by_many
        fused = tokens <= FUSED_TOKENS and not traffic.moved[weight] and not hardware.dequantize
        share = FUSED_SHARE if fused else PRODUCT_SHARE
        memory_s = moved[weight] / (hardware.device * share)
        seconds = max(memory_s, tokens * traffic.flops[weight] / hardware.matmul)
        if hardware.dequantize and not traffic.moved[weight]:  # packed, and for the CPU to unpack
            seconds += traffic.packed[weight] / hardware.dequantize
        return seconds

    def _return(self, complete: list[tuple[float, int, int]]) -> None:
        """The engine sees, when it next looks, that these kernels are complete."""
        for end, slot, generation in complete:
            when = max(self._now, end) + self._hardware.handover_s
            self._at(when, "released", slot, generation)
        self._running = [p for p in self._running if p not in complete]

    # The feeder --------------------------------------------------------------------------------

    def _step(self) -> None:
        for command in self._scheduler.step():
            match command:
                case Fill(slot, weight, _):
                    self._fill(slot, weight)
                case Grant(weight=weight):
                    self._coming[weight] = command
                    self._at(self._now, "granted", weight, 0)
                case Revoke(slot, generation):
                    self._revoke(slot, generation)
        self._copy_ahead()

    def _fill(self, slot: int, weight: int) -> None:
        """Dequantized once both the copy and the slot are there; of a copy that is still under way
        all pieces but the last are dequantized behind it."""
        hardware, size = self._hardware, self._traffic.packed[weight]
        if weight in self._scheduler.copies:
            copied = self._bring(weight)
        else:
            staged = self._staged.pop(weight, None)
            copied = self._copy(weight) if staged is None else staged
        moving_s = self._traffic.moved[weight] / (hardware.device * DEQUANTIZE_SHARE)
        if hardware.dequantize and moving_s:
            self._filler_free = max(copied, self._filler_free) + size / hardware.dequantize
            self.device_s += size / hardware.dequantize
            ready = self._filler_free
        elif copied > self._now:
            last_s = min(1.0, PIECE_BYTES / size) * moving_s
            self._compute("feeder", moving_s - last_s)
            ready = max(copied, self._device_free) + self._take_turn("feeder") + last_s
            self.device_s += last_s
        else:
            self._device_free = max(self._now, self._device_free)
            self._compute("feeder", moving_s)
            ready = self._device_free
        self._at(ready + hardware.handover_s, "filled", slot, 0)

    def _copy(self, weight: int) -> float:
        """Queue the copy; when it will be complete."""
        size = self._traffic.packed[weight]
        self._link_free = max(self._now, self._link_free) + size / self._hardware.link
        self.copied.append(weight)
        return self._link_free

    def _bring(self, weight: int) -> float:
        """When the copy that stays is there."""
        if weight not in self._near:
            self._near[weight] = self._copy(weight)
            self._link_bytes[weight] = 0
        return self._near[weight]

    def _copy_ahead(self) -> None:
        """Copy what will be filled next into staging memory, as far as that goes."""
        packed, limit_bytes = self._traffic.packed, self._hardware.staging_bytes
        if not limit_bytes:
            return
        room = limit_bytes - sum(packed[weight] for weight in self._staged)
        for weight in self._scheduler.upcoming(limit_bytes, self._link_bytes):
            if not self._traffic.moved[weight]:
                continue  # copied straight into its slot
            if weight in self._scheduler.copies:
                self._bring(weight)
            elif weight not in self._staged and packed[weight] <= room:
                room -= packed[weight]
                self._staged[weight] = self._copy(weight)

    def _revoke(self, slot: int, generation: int) -> None:
        weight = self._scheduler.slots.by_id(slot).weight
        if weight == self._waiting:  # the engine will not do without it: given back after its use
            self._recalled.add(slot)
        elif self._granted.pop(weight, None) or self._coming.pop(weight, None):
            self._at(self._now + self._hardware.handover_s, "released", slot, generation)

    # The clock ---------------------------------------------------------------------------------

    def _compute(self, who: str, seconds: float) -> None:
        if seconds:
            self._device_free += self._take_turn(who) + seconds
        self.device_s += seconds

    def _take_turn(self, who: str) -> float:
        """How long the device takes to change over to a process."""
        if who == self._turn:
            return 0.0
        self._turn = who
        return self._hardware.turn_s

    def _at(self, when: float, what: str, first: int, second: int) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (when, self._sequence, what, first, second))

    def _advance(self, until: float) -> None:
        """Let everything happen that does until then."""
        while self._events and self._events[0][0] <= until:
            self._now, _, what, first, second = heapq.heappop(self._events)
            if what == "filled":
                self._scheduler.filled(first)
            elif what == "released":
                self._scheduler.released(first, second)
            elif what == "needed":
                if first == self._waiting and first not in self._coming:
                    self._scheduler.need(first)
            elif first in self._coming:
                self._granted[first] = self._coming.pop(first)
            self._step()
        self._now = max(self._now, until)
