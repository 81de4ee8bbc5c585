"""A slot is never read before its fill is complete, nor refilled while it is read. Any order works.

The engine's end runs here, without a model: what each lease holds is compared with the reference.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from itertools import chain, repeat

import pytest
import torch

from tests import fed, stores
from tests.processes import Room

TOTAL = len(stores.LINEAR)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):
    return stores.write_store(tmp_path_factory.mktemp("store") / "store")


def orders(seed: int) -> Iterator[int]:
    """A few passes forward (the plan is learned in the first), then whatever was not foreseen."""
    generator = random.Random(seed)
    forward = list(range(TOTAL))
    shuffled = generator.sample(forward, TOTAL)
    yield from chain(forward, forward, reversed(forward), reversed(forward))
    yield from chain(shuffled, shuffled, generator.choices(forward, k=40))
    yield from chain(repeat(3, 4), forward[::2], [0, TOTAL - 1] * 5, forward)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cache", [1, 2, 7, -1])
def test_any_order_gets_the_right_weights(room: Room, store, cache: int, dtype: str) -> None:
    with fed.engine(room, store, f"--cache={cache}", f"--dtype={dtype}") as engine:
        served = 0
        for weight in chain(reversed(range(TOTAL)), orders(cache)):  # it learns the reverse
            lease = engine.client.acquire(weight)
            assert engine.holds(lease, weight), weight
            engine.client.release(lease)
            served += 1
        assert served == engine.client.stats.uses > 10 * TOTAL


@pytest.mark.parametrize("strategy", ["ring", "resident", "on-demand"])
@pytest.mark.parametrize("cache", [1, 2, 7])
def test_poison_finds_nothing(room: Room, store, cache: int, strategy: str) -> None:
    """Each lease is held for a random time, while the slots for what comes next are filled."""
    generator = random.Random(cache)
    flags = [f"--cache={cache}", f"--strategy={strategy}"]
    module = "tests.process.poison_feeder"
    with fed.engine(room, store, *flags, module=module) as engine:
        for weight in orders(cache):
            lease = engine.client.acquire(weight)
            assert engine.holds(lease, weight), f"{weight} was not there when it was granted"
            if generator.random() < 0.7:
                time.sleep(generator.random() * 0.006)
            assert engine.holds(lease, weight), f"{weight} changed while it was held"
            engine.client.release(lease)
        filled = int(engine.client.ask_status()["fills"])
    ended = engine.feeder.stop()
    found = re.search(r"poisoned (\d+) evicted slots", ended.err)
    assert found is not None and int(found[1]) >= filled - cache > 2 * TOTAL


def test_the_poison_is_seen(room: Room, store) -> None:
    """The test above can fail: what the poisoned feeder evicts is NaN, under an engine's eyes."""
    module = "tests.process.poison_feeder"
    with fed.engine(room, store, "--cache=1", module=module) as engine:
        lease = engine.client.acquire(0)
        assert engine.holds(lease, 0)
        engine.client.release(lease)
        data = lease.weight(engine.dtype, engine.store.weights[0].shape)  # no right to it any more
        other = engine.client.acquire(1)
        assert not torch.equal(data, engine.expected[0])
        engine.client.release(other)
