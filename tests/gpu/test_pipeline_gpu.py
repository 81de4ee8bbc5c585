"""On a GPU nobody waits for the other's stream: slots must be right by what was said and when.

The engine's kernels are queued late on purpose, and slots are released before they have run.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch

from tests import fed, stores
from tests.process.poison_feeder import CYCLES_PER_S
from tests.processes import Room

TOTAL = len(stores.LINEAR)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stores.write_store(tmp_path_factory.mktemp("store") / "store")


def test_poison_finds_nothing(room: Room, store: Path) -> None:
    """A feeder that overwrites slots with NaN before each fill and when they are given up."""
    generator = random.Random(2)
    forward = list(range(TOTAL))
    order = forward * 6 + forward[::-1] * 2 + generator.choices(forward, k=60)
    flags = {
        f"{strategy}-{cache}": [
            f"--model={store}", "--device=cuda", f"--strategy={strategy}", f"--cache={cache}",
        ]
        for strategy, cache in [("ring", 1), ("ring", 2), ("ring", 7), ("resident", 7)]
    }  # fmt: skip
    for name, feeder in room.feeders(flags, "tests.process.poison_feeder").items():
        with fed.connected(room, feeder, name) as engine:
            right = []
            for weight in order:
                lease = engine.client.acquire(weight)
                found = lease.weight(engine.dtype, engine.store.weights[weight].shape)
                early = (found == engine.expected[weight]).all()
                if generator.random() < 0.5:
                    torch.cuda._sleep(int(generator.random() * 0.004 * CYCLES_PER_S))
                late = (found == engine.expected[weight]).all()
                engine.client.release(lease)  # its kernels may not even have begun
                right += [early, late]
            assert bool(torch.stack(right).all()), f"{name}: {torch.stack(right).tolist()}"
            filled = int(engine.client.ask_status()["fills"])
        said = re.search(r"poisoned (\d+) evicted slots", feeder.stop().err)
        assert said is not None and int(said[1]) >= filled - 7 > 2 * TOTAL


def test_the_poison_is_seen(room: Room, store: Path) -> None:
    """The test above can fail: what is read without a right to it is NaN."""
    flags = ["--device=cuda", "--cache=1"]
    module = "tests.process.poison_feeder"
    with fed.engine(room, store, *flags, module=module) as engine:
        lease = engine.client.acquire(0)
        assert engine.holds(lease, 0)
        engine.client.release(lease)
        data = lease.weight(engine.dtype, engine.store.weights[0].shape)
        other = engine.client.acquire(1)
        assert not torch.equal(data, engine.expected[0])
        engine.client.release(other)
