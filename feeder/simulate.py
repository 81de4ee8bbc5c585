"""``python -m feeder simulate``: what a strategy would do on hardware that is not here.

The command line of feeder/simulation.py: shapes, tables and a plot.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from common.blocks import packed_bytes, packed_span
from common.config import Cache, format_bytes, parse_size
from common.entry import run_process
from common.errors import UsageError
from common.families import expected_tensors
from common.formats import FORMATS, PACKED, slot_bytes
from common.parser import Parser
from common.plan import Capacity, Plan
from common.shapes import SHAPES
from common.store import Store
from feeder.arena import aligned
from feeder.budget import Request
from feeder.scheduler import Scheduler
from feeder.simulation import (
    HANDOVER_US,
    STAGING_BYTES,
    TURN_US,
    Hardware,
    Simulation,
    Traffic,
    engine_us,
)
from feeder.strategies.registry import make_strategy

if TYPE_CHECKING:
    import argparse

_EXAMPLES = """\
  python -m feeder simulate --shape qwen2.5-32b --link 25 --device-bandwidth 900 --sweep
  python -m feeder simulate --shape STORE --slots dequantized --link 55 --device-bandwidth 3000
"""

SLOT_BYTES = 2  # an element of a bf16 slot


@dataclass(frozen=True)
class Prediction:
    """Per token, in the steady state. ``arena_bytes``: of slots and of copies beside them."""

    ms: float
    hits: float
    streamed_bytes: float
    arena_bytes: int

    @property
    def tok_per_s(self) -> float:
        return 1000 / self.ms


def predict(
    request: Request,
    elements: Sequence[int],
    strategy: str,
    hardware: Hardware,
    packed_slots: Collection[int] = (),
    host_us: float | None = None,
) -> Prediction:
    """What ``strategy`` comes to in the steady state. ``elements``: of each weight; ``packed_slots``:
    those that are not dequantized in their slots; ``host_us``: of the engine for each weight, in place of
    the hardware's; None for what it takes as a rule."""
    chosen = make_strategy(strategy)
    capacity, _ = request.capacity(chosen, 1 << 62)
    size_bytes, copies = capacity.size_bytes, frozenset[int]()
    if request.cache.count is None and not packed_slots and hardware.staging_bytes:
        copy_bytes = [aligned(packed_span(count)) for count in elements]
        copies = request.copies(chosen, capacity, copy_bytes)
        slots_bytes = size_bytes - sum(copy_bytes[weight] for weight in copies)
        capacity = Capacity(capacity.count, slots_bytes)
    traffic = Traffic.of(elements, request.sizes, packed_slots)
    scheduler = Scheduler(
        request.plan, request.sizes, capacity, chosen,
        copies=copies, link_bytes=list(traffic.packed),
    )  # fmt: skip
    if host_us is None:
        packed = len(packed_slots) == len(elements)
        host_us = engine_us(packed, capacity.holds(request.sizes))
    machine = replace(hardware, engine_s=host_us * 1e-6)
    simulation = Simulation(scheduler, traffic, machine)
    simulation.attach()
    found = simulation.steady()
    return Prediction(1000 * found.seconds, found.hits, found.streamed_bytes, size_bytes)


def load_shape(text: str) -> tuple[list[str], list[int]]:
    """Names and element counts of the weights of a named shape, or of a store."""
    if text in SHAPES:
        linear, _ = expected_tensors(SHAPES[text])
        return list(linear), [rows * columns for rows, columns in linear.values()]
    if (Path(text) / "store.json").is_file():
        store = Store.open(Path(text))
        return [w.name for w in store.weights], [w.elements for w in store.weights]
    raise UsageError(f"shape {text!r} is neither a store nor one of {', '.join(SHAPES)}")


def request_for(
    names: Sequence[str], elements: Sequence[int], slots: str, cache: str
) -> tuple[Request, Collection[int]]:
    """What `predict` takes where all weights have slots of one format, and which of them are packed."""
    sizes = [aligned(slot_bytes(slots, count, SLOT_BYTES)) for count in elements]
    request = Request(Plan(tuple(range(len(names)))), sizes, names, Cache.parse(cache))
    return request, range(len(names)) if slots == PACKED else ()


def simulate(arguments: argparse.Namespace) -> None:
    """Print what was asked for on stdout."""
    names, elements = load_shape(arguments.shape)
    packed = sum(packed_bytes(count) for count in elements)
    _check(arguments)
    hardware = Hardware(
        arguments.link * 1e9,
        arguments.device_bandwidth * 1e9,
        handover_s=arguments.handover_us * 1e-6,
        turn_s=arguments.turn_us * 1e-6,
        staging_bytes=_staging(arguments.staging),
    )
    caches = [arguments.cache]
    if arguments.sweep:
        total = len(names)
        caches = [str(n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if n < total] + ["-1"]
    print(
        f"{len(names)} weights, {format_bytes(packed)} packed; link"
        f" {arguments.link:g} GB/s: {1000 * packed / hardware.link:.1f} ms to stream all"
    )
    print("cache     slots      hits   streamed      ms/token   tok/s")
    rows = []
    for cache in caches:
        request, packed_slots = request_for(names, elements, arguments.slots, cache)
        found = predict(
            request, elements, arguments.strategy, hardware, packed_slots, arguments.engine_us
        )
        rows.append((cache, found))
        print(
            f"{cache:>8} {format_bytes(found.arena_bytes):>8} {100 * found.hits:7.1f} %"
            f" {format_bytes(found.streamed_bytes):>9} {found.ms:11.1f} {found.tok_per_s:9.2f}"
        )
    if arguments.plot:
        _plot(rows, arguments)


def _check(arguments: argparse.Namespace) -> None:
    """Before anything is printed. Raises WeightFeederError."""
    for name, value in vars(arguments).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if name in ("link", "device_bandwidth") and not 0 < value < math.inf:
            raise UsageError(f"{flag}: expected above 0 GB/s, and finite")
        host = name in ("handover_us", "turn_us") or (name == "engine_us" and value is not None)
        if host and not 0 <= value < math.inf:
            raise UsageError(f"{flag}: expected at least 0, and finite")
    Cache.parse(arguments.cache)
    make_strategy(arguments.strategy)
    if arguments.plot is not None:
        _require_plot(arguments.plot)


def _staging(text: str) -> int:
    return 0 if text.strip() == "0" else parse_size(text)


def _require_plot(name: str) -> None:
    """UsageError unless a picture can be drawn, and written there."""
    if find_spec("matplotlib") is None:
        raise UsageError(
            "--plot needs the package matplotlib, which is not installed: pip install matplotlib"
        )
    path = Path(name)
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"--plot {name}: expected a name that ends in .png or .svg")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {name}: {path.absolute().parent} is no directory")


def _plot(rows: list[tuple[str, Prediction]], arguments: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([r.arena_bytes / 1e9 for _, r in rows], [r.tok_per_s for _, r in rows], marker="o")
    axes.set_xlabel("slots, GB")
    axes.set_ylabel("tok/s")
    axes.set_title(f"{arguments.shape}, {arguments.strategy}, link {arguments.link:g} GB/s")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    try:
        figure.savefig(arguments.plot)
    except OSError as error:
        raise UsageError(f"--plot {arguments.plot} cannot be written: {error.strerror}") from error
    print(f"plot written to {arguments.plot}", file=sys.stderr)


def make_parser() -> Parser:
    """The parser of this command."""
    parser = Parser(
        "simulate",
        examples=_EXAMPLES,
        prog="python -m feeder simulate",
        description="Predicts hits, streamed bytes and tok/s from a strategy and two bandwidths.",
    )
    parser.add_argument("--shape", required=True, metavar="NAME|STORE", help="such as qwen2.5-32b")
    parser.add_argument(
        "--strategy", default="resident", metavar="NAME|FILE:CLASS", help="default: resident"
    )
    parser.add_argument("--cache", default="128", metavar="N|SIZE", help="default: 128")
    parser.add_argument("--slots", default=PACKED, choices=FORMATS, help="default: packed")
    parser.add_argument(
        "--link", type=float, required=True, metavar="GB/S", help="of the host-to-device copy"
    )
    parser.add_argument(
        "--device-bandwidth", type=float, required=True, metavar="GB/S", help="of its memory"
    )
    parser.add_argument("--engine-us", type=float, help="host time a weight; default: by slots")
    parser.add_argument("--handover-us", type=float, default=HANDOVER_US, help="message latency")
    parser.add_argument(
        "--turn-us", type=float, default=TURN_US, help="from one process to the other"
    )
    parser.add_argument(
        "--staging", default=f"{STAGING_BYTES}B", metavar="SIZE",
        help="packed bytes that may be copied before there is a slot; 0: none",
    )  # fmt: skip
    parser.add_argument("--sweep", action="store_true", help="a table over cache sizes")
    parser.add_argument("--plot", metavar="FILE", help="draw the table, as PNG or SVG")
    return parser


def main(argv: list[str]) -> int:
    """Run the command line ``argv`` (its first word is ``simulate``); the exit code."""
    arguments = make_parser().parse_args(argv[1:])
    return run_process("simulate", False, lambda leash: simulate(arguments))
