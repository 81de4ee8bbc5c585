"""What the simulator says of hardware whose answer can be worked out by hand."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from common.blocks import packed_bytes
from common.config import Cache
from common.plan import Capacity, Plan
from feeder import filler
from feeder import simulation as simulated
from feeder.arena import aligned
from feeder.budget import Request
from feeder.scheduler import Scheduler
from feeder.simulate import load_shape, predict
from feeder.simulation import (
    DEQUANTIZE_SHARE,
    FUSED_SHARE,
    PIECE_BYTES,
    PRODUCT_SHARE,
    Hardware,
    Simulation,
    Steady,
    Traffic,
)
from feeder.strategies.registry import make_strategy

COUNT, ELEMENTS = 40, 1 << 20
SLOT = 2 * ELEMENTS
PACKED = ELEMENTS // 2 + 2 * (ELEMENTS // 128)
FAST = 1e15


def simulation(
    slots: int, machine: Hardware, strategy: str = "ring", packed_slots: Collection[int] = ()
) -> Simulation:
    sizes = [PACKED if weight in packed_slots else SLOT for weight in range(COUNT)]
    chosen = make_strategy(strategy)
    capacity = Capacity(slots, slots * SLOT)
    scheduler = Scheduler(Plan(tuple(range(COUNT))), sizes, capacity, chosen)
    traffic = Traffic.of([ELEMENTS] * COUNT, sizes, packed_slots)
    made = Simulation(scheduler, traffic, machine)
    made.attach()
    return made


def hardware(
    link: float = FAST,
    device: float = FAST,
    engine_s: float = 0.0,
    handover_s: float = 0.0,
    matmul: float = float("inf"),
    staging_bytes: int = 0,
    turn_s: float = 0.0,
) -> Hardware:
    return Hardware(
        link, device, engine_s, handover_s, matmul, staging_bytes, prompt_s=engine_s, turn_s=turn_s
    )


def test_the_simulated_filler_is_the_real_one() -> None:
    assert simulated.STAGING_BYTES == filler.STAGING_BYTES
    assert packed_bytes(filler.PIECE_ELEMENTS) == PIECE_BYTES


def test_traffic_of_both_formats() -> None:
    traffic = Traffic.of([256, 1000], [512, 1024], packed_slots={1})
    assert traffic.packed == [128 + 4, 500 + 16]
    assert traffic.moved == [132 + 512, 0]
    assert traffic.used == [512, 516]
    assert traffic.used_by_many == [512, 516 + 4000]  # dequantized beside its slot, then read
    assert traffic.flops == [512, 2000]


@pytest.mark.parametrize("staging_bytes", [0, 8 * PACKED])
def test_a_slow_link_sets_the_time(staging_bytes: int) -> None:
    machine = hardware(link=1e9, engine_s=1e-6, handover_s=1e-6, staging_bytes=staging_bytes)
    found = simulation(8, machine).steady()
    assert found.seconds == pytest.approx(COUNT * PACKED / 1e9, rel=0.01)
    assert found.streamed_bytes == pytest.approx(COUNT * PACKED, rel=0.01)
    assert found.link_s == pytest.approx(found.seconds, rel=0.02)
    assert found.streamed == frozenset(range(COUNT))
    assert found.hits == 0


def test_a_slow_host_sets_the_time_of_what_is_resident() -> None:
    found = simulation(COUNT, hardware(engine_s=300e-6), "resident").steady()
    assert found.seconds == pytest.approx(COUNT * 300e-6, rel=1e-3)
    assert (found.streamed_bytes, found.streamed, found.hits) == (0, frozenset(), 1)
    assert found.host_s == pytest.approx(found.seconds, rel=1e-3)


def test_a_slow_device_reads_slots_as_they_are() -> None:
    dequantized = simulation(COUNT, hardware(device=1e12), "resident").steady()
    assert dequantized.seconds == pytest.approx(COUNT * SLOT / 1e12 / PRODUCT_SHARE, rel=1e-3)
    every = range(COUNT)
    packed = simulation(COUNT, hardware(device=1e12), "resident", every).steady()
    assert packed.seconds == pytest.approx(COUNT * PACKED / 1e12 / FUSED_SHARE, rel=1e-3)
    assert packed.device_s == pytest.approx(packed.seconds, rel=1e-3)


def test_dequantizing_takes_the_device_too() -> None:
    found = simulation(8, hardware(device=1e10)).steady()
    dequantizing = COUNT * (PACKED + SLOT) / 1e10 / DEQUANTIZE_SHARE
    using = COUNT * SLOT / 1e10 / PRODUCT_SHARE
    assert found.device_s == pytest.approx(dequantizing + using, rel=0.05)
    assert found.seconds >= using


def test_two_processes_take_turns_on_the_device() -> None:
    """With one slot each fill waits for the use before it, and each use for its fill."""
    found = simulation(1, hardware(device=1e9, turn_s=1e-3)).steady().seconds
    assert found - simulation(1, hardware(device=1e9)).steady().seconds == pytest.approx(
        COUNT * 2e-3, rel=0.01
    )
    alone = simulation(COUNT, hardware(device=1e9, turn_s=1e-3)).steady().seconds
    assert alone == pytest.approx(simulation(COUNT, hardware(device=1e9)).steady().seconds)


@pytest.mark.parametrize("cache", ["6GiB", "8GiB", "10GiB"])
def test_an_engine_that_is_ahead_makes_nothing_cross_the_link_twice(cache: str) -> None:
    """A needed weight finds room behind the engine, and not by taking lm_head's slot."""
    names, elements = load_shape("qwen2.5-32b")
    sizes = [aligned(2 * count) for count in elements]
    request = Request(Plan(tuple(range(len(names)))), sizes, names, Cache.parse(cache))
    slow, fast = (
        predict(request, elements, "resident", Hardware(55e9, 3e12), host_us=us)
        for us in (180.0, 50.0)
    )
    assert fast.streamed_bytes == slow.streamed_bytes
    assert fast.ms == pytest.approx(slow.ms, rel=0.01)


def test_the_cpu_dequantizes_on_a_thread_or_at_every_use() -> None:
    machine = Hardware(FAST, FAST, 0.0, 0.0, staging_bytes=0, dequantize=1e9)
    filled = simulation(8, machine).steady()
    assert filled.seconds == pytest.approx(COUNT * PACKED / 1e9, rel=0.05)
    assert filled.device_s == pytest.approx(filled.seconds, rel=0.05)
    assert simulation(COUNT, machine, "resident").steady().seconds < 1e-3
    used = simulation(COUNT, machine, "resident", range(COUNT)).steady()
    assert used.seconds == pytest.approx(COUNT * PACKED / 1e9, rel=0.01)
    # Nothing is launched ahead there: the host's time and the product's come one after the other.
    machine = Hardware(FAST, FAST, 100e-6, 0.0, staging_bytes=0, dequantize=1e9)
    used = simulation(COUNT, machine, "resident", range(COUNT)).steady()
    assert used.seconds == pytest.approx(COUNT * (PACKED / 1e9 + 100e-6), rel=0.01)


def test_what_stays_is_not_streamed() -> None:
    found = simulation(18, hardware(link=1e9), "resident").steady()
    assert len(found.streamed) == COUNT - 10  # eight of the slots stream
    assert found.streamed_bytes == pytest.approx((COUNT - 10) * PACKED, rel=0.01)
    assert found.seconds == pytest.approx(found.streamed_bytes / 1e9, rel=0.05)


def late(staging_bytes: int, slots: int = 1, packed_slots: Collection[int] = ()) -> Steady:
    """With one slot that is given back late, the link idles between two fills."""
    machine = hardware(link=1e9, handover_s=400e-6, staging_bytes=staging_bytes)
    return simulation(slots, machine, packed_slots=packed_slots).steady()


def test_staging_keeps_the_link_busy_while_slots_are_late() -> None:
    streaming = COUNT * PACKED / 1e9
    assert late(0).seconds > 2 * streaming
    assert streaming <= late(4 * PACKED).seconds < 1.6 * streaming < late(PACKED - 1).seconds
    assert late(PACKED - 1).seconds == late(0).seconds  # it holds not one
    for bytes_ in (0, PACKED, 4 * PACKED, 100 * PACKED):  # nothing is copied twice
        assert late(bytes_).streamed_bytes == pytest.approx(COUNT * PACKED, rel=0.05)


def test_what_is_packed_in_its_slot_is_never_staged() -> None:
    every = range(COUNT)
    assert late(0, 3, every) == late(8 * PACKED, 3, every)


def test_many_tokens_are_bound_by_products() -> None:
    machine = hardware(link=1e12, device=1e12, matmul=1e12)
    prefill = simulation(COUNT, machine, "resident")
    one = prefill.steady().seconds
    flops = COUNT * 2 * ELEMENTS
    assert prefill.run(1, 1024) == pytest.approx(1024 * flops / 1e12, rel=0.01)
    assert prefill.run(1, 16) == pytest.approx(16 * flops / 1e12, rel=0.01)
    assert prefill.run(1) == pytest.approx(one, rel=0.01)
    # Where the link is slower than that, it streams once, whatever the length.
    machine = hardware(link=1e9, matmul=1e14)
    assert simulation(8, machine).run(1, 1024) == pytest.approx(COUNT * PACKED / 1e9, rel=0.05)


def test_many_tokens_with_packed_slots_dequantize_first() -> None:
    prefill = simulation(COUNT, hardware(device=1e12), "resident", range(COUNT))
    prefill.steady()
    read = COUNT * PACKED / 1e12 / FUSED_SHARE
    assert prefill.run(1, 16) == pytest.approx(read, rel=0.01)
    more = COUNT * (PACKED + 4 * ELEMENTS) / 1e12 / PRODUCT_SHARE
    assert prefill.run(1, 17) == pytest.approx(more, rel=0.01)


def test_large_weights_are_dequantized_behind_their_copy() -> None:
    """All but the last piece: the copy of one that is ten pieces long hides nine of them."""
    elements = 20 * PIECE_BYTES
    sizes = [2 * elements] * 2
    traffic = Traffic.of([elements] * 2, sizes)
    scheduler = Scheduler(Plan((0, 1)), sizes, Capacity(1, sizes[0]), make_strategy("ring"))
    machine = hardware(link=1e9, device=1e10)
    made = Simulation(scheduler, traffic, machine)
    made.attach()
    copying = traffic.packed[0] / 1e9
    dequantizing = traffic.moved[0] / 1e10 / DEQUANTIZE_SHARE
    using = sizes[0] / 1e10 / PRODUCT_SHARE
    both = copying + 0.1 * dequantizing + using
    assert made.steady().seconds == pytest.approx(2 * both, rel=0.05)


def test_a_weight_that_is_waited_for_may_be_recalled() -> None:
    """It was filled where there was room, not where it stays, and is asked back as it is granted."""
    names, elements = load_shape("qwen2.5-32b")
    sizes = [2 * count for count in elements]
    plan, chosen = Plan(tuple(range(len(names)))), make_strategy("resident")
    capacity = Capacity(128, chosen.arena_bytes(plan, sizes, 128))
    scheduler = Scheduler(plan, sizes, capacity, chosen)
    made = Simulation(scheduler, Traffic.of(elements, sizes), Hardware(54.5e9, 3e12))
    made.attach()
    found = made.steady()
    assert found.seconds >= 0.99 * found.link_s
    assert 0.2 < found.hits < 0.3
