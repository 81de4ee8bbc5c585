"""A slot is never read before its fill is complete, nor refilled while it is read. Any order works.

The engine's end runs here, without a model: what each lease holds is compared with the reference.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path

import pytest

from common.store import Store
from feeder.quantize import quantize_checkpoint
from tests import fed, lives, stores
from tests.checkpoints import make_checkpoint
from tests.processes import Room

TOTAL = len(stores.LINEAR)


@pytest.fixture(scope="module", params=lives.SLOTS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose weights are packed in slots, and one of shapes for which that cannot be."""
    path = tmp_path_factory.mktemp("store")
    if request.param == "dequantized":
        return stores.write_store(path / "store")
    checkpoint = make_checkpoint(path / "model", hidden=64, intermediate=128)
    quantize_checkpoint(checkpoint, path / "store", "cpu", progress=False)
    assert len(Store.open(path / "store").weights) == TOTAL
    return path / "store"


def orders() -> Iterator[int]:
    """A few passes forward (the plan is learned in the first), then whatever was not foreseen."""
    generator = random.Random(5)
    forward = list(range(TOTAL))
    shuffled = generator.sample(forward, TOTAL)
    yield from chain(forward, forward, reversed(forward), reversed(forward))
    yield from chain(shuffled, shuffled, generator.choices(forward, k=40))
    yield from chain(repeat(3, 4), forward[::2], [0, TOTAL - 1] * 5, forward)


def test_any_order_gets_the_right_weights(room: Room, store: Path) -> None:
    flags = {
        "one": ["--cache=1"],
        "two": ["--cache=2", "--dtype=bfloat16"],
        "seven": ["--cache=7", "--dtype=float16"],
        "all": ["--cache=-1"],
    }
    feeders = room.feeders({name: [f"--model={store}", *flags[name]] for name in flags})
    for name, feeder in feeders.items():
        with fed.connected(room, feeder, name) as engine:
            served = 0
            for weight in chain(reversed(range(TOTAL)), orders()):  # it learns the reverse
                lease = engine.client.acquire(weight)
                assert engine.holds(lease, weight), (name, weight)
                engine.client.release(lease)
                served += 1
            assert served == engine.client.stats.uses > 10 * TOTAL


@pytest.mark.parametrize("cache", [1, 2, 7])
def test_poison_finds_nothing(room: Room, store: Path, cache: int) -> None:
    """Each lease is held for a random time, while the slots for what comes next are filled."""
    generator = random.Random(cache)
    common = [f"--model={store}", f"--cache={cache}"]
    flags = {name: [*common, f"--strategy={name}"] for name in ("ring", "resident", "on-demand")}
    for name, feeder in room.feeders(flags, "tests.process.poison_feeder").items():
        with fed.connected(room, feeder, name) as engine:
            for weight in orders():
                lease = engine.client.acquire(weight)
                assert engine.holds(lease, weight), f"{name}: {weight} was not there when granted"
                if generator.random() < 0.5:
                    time.sleep(generator.random() * 0.006)
                assert engine.holds(lease, weight), f"{name}: {weight} changed while it was held"
                engine.client.release(lease)
            filled = int(engine.client.ask_status()["fills"])
        found = re.search(r"poisoned (\d+) evicted slots", feeder.stop().err)
        assert found is not None and int(found[1]) >= filled - cache > 2 * TOTAL


def test_the_poison_is_seen(room: Room, store: Path) -> None:
    """The test above can fail: what the poisoned feeder evicts is NaN, under an engine's eyes."""
    module = "tests.process.poison_feeder"
    with fed.engine(room, store, "--cache=1", module=module) as engine:
        lease = engine.client.acquire(0)
        assert engine.holds(lease, 0)
        engine.client.release(lease)
        other = engine.client.acquire(1)
        assert not engine.holds(lease, 0)  # nor has it a right to look at it any more
        engine.client.release(other)


def test_a_weight_that_is_held_can_be_had_again(room: Room, store: Path) -> None:
    """As in a debugger, at a breakpoint inside the Linear that is to be evaluated."""
    flags = {
        "one": ["--cache=1"],
        "all": ["--cache=-1", "--strategy=ring"],
        "standing": ["--cache=-1", "--strategy=resident"],
    }
    feeders = room.feeders({name: [f"--model={store}", *flags[name]] for name in flags})
    for name, feeder in feeders.items():
        with fed.connected(room, feeder, name) as engine:
            client = engine.client
            for weight in chain(range(TOTAL), range(TOTAL)):
                first = client.acquire(weight)
                client.release(client.acquire(weight))
                assert engine.holds(first, weight)
                second = client.acquire(weight)
                client.release(first)
                assert engine.holds(second, weight)
                client.release(second)
            assert client.stats.uses == 6 * TOTAL


def test_several_weights_at_once_or_none(room: Room, store: Path) -> None:
    """An engine takes what is there together, else one after the other; it is always served."""
    groups = [list(range(TOTAL))[i : i + 3] for i in range(0, TOTAL, 3)]
    common = [f"--model={store}"]
    flags = {
        f"{strategy}{cache}": [*common, f"--strategy={strategy}", f"--cache={cache}"]
        for strategy, cache in (("ring", 1), ("ring", 7), ("resident", -1), ("on-demand", 3))
    }
    for name, feeder in room.feeders(flags).items():
        with fed.connected(room, feeder, name) as engine:
            together = sum(_use(engine, group) for group in groups * 6)
        if name == "ring1":
            assert together == 0
        if name == "resident-1":  # once all are there, nobody waits
            assert together >= 3 * len(groups)


def _use(engine: fed.Engine, group: list[int]) -> bool:
    """Use the weights of a group; whether they were had together."""
    client = engine.client
    before = client.stats.uses
    leases = client.try_acquire(group)
    if leases is None:
        assert client.stats.uses == before
        for weight in group:
            lease = client.acquire(weight)
            assert engine.holds(lease, weight)
            client.release(lease)
    else:
        assert [lease.grant.weight for lease in leases] == group
        for lease, weight in zip(leases, group, strict=True):
            assert engine.holds(lease, weight)
        for lease in leases:
            client.release(lease)
    assert client.stats.uses == before + len(group)
    return leases is not None
