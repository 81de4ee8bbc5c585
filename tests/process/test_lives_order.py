"""Any order with any strategy, and what the simulator says of the orders that were foreseen."""

from __future__ import annotations

import random
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from common import protocol as p
from common.config import Cache
from common.plan import Plan
from feeder.arena import aligned
from feeder.budget import Request
from feeder.simulate import Hardware, load_shape, predict
from feeder.strategies.resident import stream_slots
from tests import fed, lives
from tests.processes import Room, assert_refused, until

pytestmark = pytest.mark.usefixtures("device_as_before")

PASSES = lives.count(4, 40)


def use(engine: fed.Engine, weight: int) -> None:
    lease = engine.client.acquire(weight)
    assert engine.holds(lease, weight), weight
    engine.client.release(lease)


@pytest.mark.parametrize("strategy", lives.STRATEGIES)
@pytest.mark.parametrize("slots", lives.SLOTS)
def test_a_cache_of_one_serves_every_order(
    room: Room, long_store: Path, strategy: str, slots: str
) -> None:
    generator = random.Random(2)
    feeder = room.feeder(*lives.feeder_flags(long_store, 1, strategy, slots))
    with fed.connected(room, feeder) as engine:
        total = len(engine.store.weights)
        forward = list(range(total))
        for weight in forward * 2:  # that is the plan
            use(engine, weight)
        for _ in range(PASSES):
            for weight in reversed(forward):
                use(engine, weight)
            for weight in generator.sample(forward, total):
                use(engine, weight)
            for weight in generator.choices(forward, k=total):
                use(engine, weight)
        fields = engine.client.ask_status()
        assert fields["slots"] == 1 and fields["strategy"] == strategy
        assert fields["packed_slots"] == (total if slots == "packed" else 0)
        assert engine.client.stats.uses == (2 + 3 * PASSES) * total
    assert "failed" not in feeder.err


# A feeder that falls behind a fast engine finds in slots what it has not yet replaced: so each use waits
# until nothing is being filled. A ring of more slots than may be filled at once does so all the same, and
# on-demand may drop a weight or take another back.
COMBINATIONS = [("ring", cache) for cache in ("1", "4", "5", "-1")]
COMBINATIONS += [("resident", cache) for cache in ("1", "4", "5", "11", "-1")]
LINK = ["--link=50", "--device-bandwidth=3000"]
ROW = re.compile(r" *(\S+) +([\d.]+ \S+) +([\d.]+) % +([\d.]+ \S+) +([\d.]+) +([\d.]+)")


def rows(out: str) -> list[tuple[str, ...]]:
    """Cache, slots, hits, streamed bytes, ms and tok/s of each line of a simulation."""
    return [found.groups() for line in out.splitlines() if (found := ROW.fullmatch(line))]


def test_the_simulator_hits_what_a_feeder_hits(room: Room, long_store: Path) -> None:
    feeder = room.feeder(
        *lives.feeder_flags(long_store, 1, slots="dequantized"), "--dtype=bfloat16"
    )
    with fed.connected(room, feeder) as engine:
        names, elements = load_shape(str(long_store))
        total = len(names)

        def simulated(strategy: str, cache: str) -> float:
            sizes = [aligned(2 * count) for count in elements]
            request = Request(Plan(tuple(range(total))), sizes, names, Cache.parse(cache))
            return predict(request, elements, strategy, Hardware(50e9, 3e12)).hits

        def one_pass() -> float:
            for weight in range(total):
                use(engine, weight)
                until(
                    lambda: engine.client.ask_status().get("full"),
                    lambda: "the feeder does not rest",
                )
            return float(engine.client.ask_status()["hit_rate"])

        one_pass()
        for strategy, cache in COMBINATIONS:
            with lives.meanwhile(one_pass):
                lives.ask(room, p.Swap(strategy, cache))
            for _ in range(4):
                live = one_pass()
            assert simulated(strategy, cache) == pytest.approx(live), (strategy, cache)
            if strategy == "resident" and cache in ("5", "11"):
                staying = int(cache) - stream_slots(int(cache), total)
                assert live == pytest.approx(staying / total)


def test_what_simulate_prints(room: Room, long_store: Path, tmp_path: Path) -> None:
    simulate = ("-m", "feeder", "simulate")
    shape = room.start(*simulate, "--shape=qwen2.5-32b", "--cache=128", *LINK)
    drawn = tmp_path / "sweep.svg"
    sweep = room.start(
        *simulate, f"--shape={long_store}", "--strategy=ring", "--sweep", f"--plot={drawn}", *LINK
    )
    file = tmp_path / "mine.py"
    file.write_text("from feeder.strategies.ring import Ring\n\nclass Mine(Ring):\n    pass\n")
    own = room.start(
        *simulate, f"--shape={long_store}", f"--strategy={file}:Mine", "--sweep", *LINK
    )
    bad = {
        ("--shape=gpt-9", *LINK): "shape 'gpt-9' is neither a store nor one of",
        ("--shape=qwen2.5-32b", "--strategy=best", *LINK): "strategy 'best' is not known",
        ("--shape=qwen2.5-32b", "--cache=0", *LINK): "cache '0' holds no weight",
        ("--shape=qwen2.5-32b", "--cache=1MB", *LINK): "the largest weight, lm_head, needs",
        ("--shape=qwen2.5-32b", "--link=0", "--device-bandwidth=1"): "--link 0.0: expected above 0",
        ("--shape=qwen2.5-32b", "--link=1"): "required: --device-bandwidth",
        ("--shape=qwen2.5-32b", "--link=fast", "--device-bandwidth=1"): "--link: invalid float",
    }
    refused = {words: room.start(*simulate, *words) for words in bad}
    ended = shape.wait()
    assert ended.code == 0, ended.err
    assert ended.out.startswith("449 weights, 16.5 GB packed; link 50 GB/s: 329.8 ms")
    ((cache, slots, hits, streamed, ms, tokens),) = rows(ended.out)
    total, staying = 449, 128 - stream_slots(128, 449)
    assert cache == "128" and slots.endswith(" GB")
    assert float(hits) == pytest.approx(100 * staying / total, abs=0.1)
    number, unit = streamed.split()
    assert unit == "GB" and 8 < float(number) < 16.5
    assert float(ms) >= 1000 * float(number) / 50.5  # it cannot beat the link
    assert float(tokens) == pytest.approx(1000 / float(ms), rel=0.02)
    swept = sweep.wait()
    assert swept.code == 0 and f"plot written to {drawn}" in swept.err
    assert ElementTree.parse(drawn).getroot().tag.endswith("svg")
    table = rows(swept.out)
    assert [row[0] for row in table] == ["1", "2", "4", "8", "-1"]
    assert [row[2] for row in table] == ["0.0"] * 4 + ["100.0"]
    assert rows(own.wait().out) == table
    for words, process in refused.items():
        assert_refused(process.wait(), bad[words])
