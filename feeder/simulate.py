"""``python -m feeder simulate``: what a strategy would do on hardware that is not here.

Runs the very scheduler and strategy that serve, against a clock of its own: a link that carries one
weight after the other, a device whose kernels (the feeder's and the engine's) take turns, an engine
that uses the weights in plan order, one token a pass. No torch, no zmq.
"""

from __future__ import annotations

import heapq
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.arguments import Parser
from common.blocks import packed_bytes
from common.config import Cache, format_bytes
from common.entry import run_process
from common.errors import UsageError
from common.plan import Plan
from common.qwen2 import expected_tensors
from common.shapes import SHAPES
from common.store import Store
from feeder.arena import aligned
from feeder.budget import Request
from feeder.scheduler import Fill, Grant, Revoke, Scheduler
from feeder.strategies.registry import make_strategy

if TYPE_CHECKING:
    import argparse

SLOT_BYTES = 2  # an element of a bf16 slot
TILE_BYTES = 33 << 20
#: Host time of the engine for each weight: what transformers and acquire/release take to launch it.
#: Measured on an H100 machine: 142 ms of a token of the 32B shape that were not spent waiting.
ENGINE_US = 320.0
#: From a fact on the device to the other process having acted on it.
HANDOVER_US = 200.0
WARM_PASSES, COUNTED_PASSES = 2, 3


@dataclass(frozen=True)
class Hardware:
    """``link`` and ``device``: bytes a second. ``engine_s`` and ``handover_s``: a weight."""

    link: float
    device: float
    engine_s: float = ENGINE_US * 1e-6
    handover_s: float = HANDOVER_US * 1e-6


@dataclass(frozen=True)
class Prediction:
    """Per token, in the steady state."""

    ms: float
    hits: float
    streamed_bytes: float
    arena_bytes: int

    @property
    def tok_per_s(self) -> float:
        return 1000 / self.ms


class Simulation:
    """One feeder, one engine, one clock (seconds)."""

    def __init__(self, scheduler: Scheduler, packed: list[int], hardware: Hardware) -> None:
        self._scheduler, self._packed, self._hardware = scheduler, packed, hardware
        self._now = 0.0
        self._link_free = self._device_free = 0.0
        self._events: list[tuple[float, int, str, int, int]] = []
        self._sequence = 0
        self._granted: dict[int, Grant] = {}
        self._coming: dict[int, Grant] = {}
        self._running: list[tuple[float, int, int]] = []  # kernel's end, slot, generation
        self.streamed_bytes = 0

    def run(self, passes: int) -> float:
        """Seconds that ``passes`` passes take."""
        start = self._now
        for _ in range(passes):
            for weight in self._scheduler.plan.order:
                self._use(weight)
        return self._now - start

    def attach(self) -> None:
        self._scheduler.attach()
        self._step()

    def _use(self, weight: int) -> None:
        hardware, scheduler = self._hardware, self._scheduler
        self._advance(self._now + hardware.engine_s)
        self._return([p for p in self._running if p[0] <= self._now])
        if weight not in self._granted:
            self._return(self._running)  # while it waits, the engine looks all the time
            scheduler.need(weight)
            self._step()
        while weight not in self._granted:
            self._advance(self._events[0][0])
        grant = self._granted[weight]
        kernel_s = scheduler.sizes[weight] / hardware.device
        self._device_free = max(self._now, self._device_free) + kernel_s
        if not grant.standing:
            del self._granted[weight]
            self._running.append((self._device_free, grant.slot, grant.generation))

    def _return(self, complete: list[tuple[float, int, int]]) -> None:
        """The engine sees, when it next looks, that these kernels are complete."""
        for end, slot, generation in complete:
            when = max(self._now, end) + self._hardware.handover_s
            self._at(when, "released", slot, generation)
        self._running = [p for p in self._running if p not in complete]

    def _advance(self, until: float) -> None:
        """Let everything happen that does until then."""
        while self._events and self._events[0][0] <= until:
            self._now, _, what, first, second = heapq.heappop(self._events)
            if what == "filled":
                self._scheduler.filled(first)
            elif what == "released":
                self._scheduler.released(first, second)
            elif first in self._coming:
                self._granted[first] = self._coming.pop(first)
            self._step()
        self._now = max(self._now, until)

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

    def _fill(self, slot: int, weight: int) -> None:
        size, hardware = self._packed[weight], self._hardware
        self._link_free = max(self._now, self._link_free) + size / hardware.link
        self.streamed_bytes += size
        moved = size + self._scheduler.sizes[weight]
        last_tile = min(1.0, TILE_BYTES / size)  # the others are dequantized behind the copy
        self._device_free += (1 - last_tile) * moved / hardware.device
        ready = max(self._link_free, self._device_free) + last_tile * moved / hardware.device
        self._at(ready + hardware.handover_s, "filled", slot, 0)

    def _revoke(self, slot: int, generation: int) -> None:
        weight = self._scheduler.slots.by_id(slot).weight
        if self._granted.pop(weight, None) or self._coming.pop(weight, None):
            self._at(self._now + self._hardware.handover_s, "released", slot, generation)

    def _at(self, when: float, what: str, first: int, second: int) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (when, self._sequence, what, first, second))


def predict(request: Request, packed: list[int], strategy: str, hardware: Hardware) -> Prediction:
    """What ``strategy`` comes to in the steady state."""
    chosen = make_strategy(strategy)
    capacity, _ = request.capacity(chosen, 1 << 62)
    scheduler = Scheduler(request.plan, request.sizes, capacity, chosen)
    simulation = Simulation(scheduler, packed, hardware)
    simulation.attach()
    simulation.run(WARM_PASSES)
    before = simulation.streamed_bytes
    seconds = simulation.run(COUNTED_PASSES)
    return Prediction(
        ms=1000 * seconds / COUNTED_PASSES,
        hits=scheduler.hit_rate,
        streamed_bytes=(simulation.streamed_bytes - before) / COUNTED_PASSES,
        arena_bytes=capacity.size_bytes,
    )


def load_shape(text: str) -> tuple[list[str], list[int]]:
    """Names and element counts of the weights of a named shape, or of a store."""
    if text in SHAPES:
        linear, _ = expected_tensors(SHAPES[text])
        return list(linear), [rows * columns for rows, columns in linear.values()]
    if (Path(text) / "store.json").is_file():
        store = Store.open(Path(text))
        return [w.name for w in store.weights], [w.elements for w in store.weights]
    raise UsageError(f"shape {text!r} is neither a store nor one of {', '.join(SHAPES)}")


def simulate(arguments: argparse.Namespace) -> None:
    """Print what was asked for on stdout."""
    names, elements = load_shape(arguments.shape)
    sizes = [aligned(count * SLOT_BYTES) for count in elements]
    packed = [packed_bytes(count) for count in elements]
    plan = Plan(tuple(range(len(names))))
    for flag in ("link", "device_bandwidth"):
        if not getattr(arguments, flag) > 0:
            raise UsageError(f"--{flag.replace('_', '-')} must be above 0 GB/s")
    hardware = Hardware(
        arguments.link * 1e9,
        arguments.device_bandwidth * 1e9,
        arguments.engine_us * 1e-6,
        arguments.handover_us * 1e-6,
    )
    caches = [arguments.cache]
    if arguments.sweep:
        total = len(names)
        caches = [str(n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if n < total] + ["-1"]
    print(
        f"{len(names)} weights, {format_bytes(sum(packed))} packed; link"
        f" {arguments.link:g} GB/s: {1000 * sum(packed) / hardware.link:.1f} ms to stream all"
    )
    print("cache     slots      hits   streamed      ms/token   tok/s")
    rows = []
    for cache in caches:
        request = Request(plan, sizes, names, Cache.parse(cache))
        found = predict(request, packed, arguments.strategy, hardware)
        rows.append((cache, found))
        print(
            f"{cache:>8} {format_bytes(found.arena_bytes):>8} {100 * found.hits:7.1f} %"
            f" {format_bytes(found.streamed_bytes):>9} {found.ms:11.1f} {found.tok_per_s:9.2f}"
        )
    if arguments.plot:
        _plot(rows, arguments)


def _plot(rows: list[tuple[str, Prediction]], arguments: argparse.Namespace) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise UsageError(
            "--plot needs the package matplotlib, which is not installed: pip install matplotlib"
        ) from error
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([r.arena_bytes / 1e9 for _, r in rows], [r.tok_per_s for _, r in rows], marker="o")
    axes.set_xlabel("slots, GB")
    axes.set_ylabel("tok/s")
    axes.set_title(f"{arguments.shape}, {arguments.strategy}, link {arguments.link:g} GB/s")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(arguments.plot)
    print(f"plot written to {arguments.plot}", file=sys.stderr)


def main(argv: list[str]) -> int:
    """Run the command line ``argv`` (its first word is ``simulate``); the exit code."""
    parser = Parser(
        prog="python -m feeder simulate",
        description="Predicts hits, streamed bytes and tok/s from a strategy and two bandwidths.",
    )
    parser.add_argument("--shape", required=True, metavar="NAME|STORE", help="such as qwen2.5-32b")
    parser.add_argument("--strategy", default="resident", metavar="NAME|FILE:CLASS")
    parser.add_argument("--cache", default="128", metavar="N|SIZE")
    parser.add_argument("--link", type=float, required=True, metavar="GB/S")
    parser.add_argument("--device-bandwidth", type=float, required=True, metavar="GB/S")
    parser.add_argument("--engine-us", type=float, default=ENGINE_US, help="host time a weight")
    parser.add_argument("--handover-us", type=float, default=HANDOVER_US, help="message latency")
    parser.add_argument("--sweep", action="store_true", help="a table over cache sizes")
    parser.add_argument("--plot", metavar="FILE", help="draw the table, as PNG or SVG")
    arguments = parser.parse_args(argv[1:])
    return run_process("simulate", False, lambda leash: simulate(arguments))
