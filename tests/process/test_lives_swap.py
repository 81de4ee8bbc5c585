"""Strategy and cache are changed in the middle of a generation; it goes on to the same text."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from common import protocol as p
from common.errors import PeerError
from common.store import Store
from feeder.strategies.resident import stream_slots
from tests import lives
from tests.processes import PATIENCE_S, Process, Room, assert_refused

pytestmark = pytest.mark.usefixtures("device_as_before")

SWAPS = lives.count(12, 100)
TOKENS = lives.count(500, lives.LONGEST)
CACHES = ["", "1", "2", "4", "6", "-1", "200KB", "300KB", "1MB"]

FAILS_LATER = """
from feeder.strategies.ring import Ring

class FailsLater(Ring):
    name = "fails-later"
    uses = 0

    def released(self, weight):
        self.uses += 1
        if self.uses == 40:
            raise RuntimeError("had enough")
"""


def swap(room: Room, strategy: str, cache: str = "", slots: str = "") -> str:
    answer = lives.ask(room, p.Swap(strategy, cache, slots))
    assert isinstance(answer, p.Done)
    return answer.text


def until_passes(room: Room, engine: Process, more: int) -> dict:
    """The status as soon as ``more`` passes have ended since now."""
    start = lives.status(room)["passes"]
    found: list[dict] = []

    def passed() -> bool:
        found.append(lives.status(room))
        return found[-1]["passes"] >= start + more

    engine.until(passed, f"makes {more} passes")
    return found[-1]


def test_swaps_at_random_moments_leave_the_text_as_it_is(
    room: Room, long_store: Path, long_text: list[str]
) -> None:
    generator = random.Random(7)
    feeder = room.feeder(*lives.feeder_flags(long_store))
    engine = room.engine(*lives.engine_flags(TOKENS))
    lives.until_generating(engine)
    pid = lives.status(room)["engine_pid"]
    seen, held = set(), lives.SLOTS[0]
    for number in range(SWAPS):
        strategy, cache = generator.choice(lives.STRATEGIES), generator.choice(CACHES)
        slots = generator.choice(("", *lives.SLOTS))
        held = slots or held
        swap(room, strategy, cache, slots)
        fields = lives.status(room)
        assert fields["strategy"] == strategy
        assert fields["packed_slots"] == (fields["weights"] if held == "packed" else 0)
        assert fields["engine_pid"] == pid == engine.pid, f"not the same engine: {number} swaps"
        seen.add((strategy, fields["slots"], held))
        lives.pause(generator.random() * 0.15)
    assert engine.popen.poll() is None, f"the generation is too short for {SWAPS} swaps"
    assert len(seen) >= min(SWAPS // 4, 10 * len(lives.SLOTS))  # not always the same one
    assert {held for *_, held in seen} == {*lives.SLOTS}
    swap(room, "resident", "-1")  # the last may be the slowest there is, for all that is left
    ended = engine.wait()
    assert ended.code == 0, ended.err
    assert ended.out.split() == long_text[:TOKENS]
    assert feeder.err.count("swapped:") == SWAPS + 1
    assert feeder.err.count("is here") == 1  # one engine, which never had to say hello again


def test_hit_rate_of_resident_shows_after_a_pass(
    room: Room, long_store: Path, long_text: list[str]
) -> None:
    total = len(Store.open(long_store).weights)
    room.feeder(*lives.feeder_flags(long_store, cache=3))
    engine = room.engine(*lives.engine_flags(lives.LONGEST))
    lives.until_generating(engine)
    assert until_passes(room, engine, 2)["hit_rate"] == 0.0  # a ring that is too small hits nothing
    for slots in (11, 1, 9, 3, 5):
        swap(room, "resident", str(slots))
        # The pass under way, and one in which the last of what stays may have to come.
        fields = until_passes(room, engine, 3)
        staying = slots - stream_slots(slots, total)
        assert fields["hit_rate"] == pytest.approx(staying / total, abs=1e-9), slots
        assert fields["standing"] == staying
    swap(room, "resident", str(total))
    engine.until(lambda: lives.status(room)["hit_rate"] == 1.0, "finds that everything stays")
    before = lives.status(room)
    assert before["standing"] == total
    lives.pause(0.1)
    after = lives.status(room)
    assert after["engine_uses"] > before["engine_uses"]
    assert after["grants"] == before["grants"]  # no messages at all for what stays
    swap(room, "ring", "3")
    assert until_passes(room, engine, 3)["hit_rate"] == 0.0
    ended = engine.wait()
    assert ended.out.split() == long_text


def test_swaps_that_are_refused(
    room: Room, long_store: Path, long_text: list[str], tmp_path: Path
) -> None:
    mistakes = {
        "empty.py": ("", "has no class Mine"),
        "broken.py": ("def", "fails to import: SyntaxError"),
        "other.py": ("class Mine:\n    pass", "has no class Mine derived from"),
        "raises.py": (
            "from feeder.strategies.base import Strategy\n"
            "class Mine(Strategy):\n    def __init__(self): raise OSError('no')\n",
            "raises OSError: no",
        ),
    }
    room.feeder(*lives.feeder_flags(long_store, cache=4))
    engine = room.engine(*lives.engine_flags(400))
    lives.until_generating(engine)
    for name, (text, problem) in mistakes.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(PeerError, match=problem.replace("(", r"\(").replace(")", r"\)")):
            lives.ask(room, p.Swap(f"{tmp_path / name}:Mine", ""))
    with pytest.raises(PeerError, match="absent.py does not exist"):
        lives.ask(room, p.Swap(f"{tmp_path}/absent.py:Mine", ""))
    with pytest.raises(PeerError, match="cache '0' holds no weight"):
        lives.ask(room, p.Swap("ring", "0"))
    with pytest.raises(PeerError, match="slots 'int4' found: expected auto, packed, dequantized"):
        lives.ask(room, p.Swap("ring", "", "int4"))
    commands = {
        ("swap", "best"): "strategy 'best' is not known: name one of ring, resident, on-demand",
        ("swap", "ring", "--cache=1KB"): "the largest weight, lm_head, needs",
        ("swap", "ring", "--cache=none"): "cache 'none' is not understood",
        ("swap", "ring", "--name=other"): "no feeder 'other' is running",
    }
    running = {words: room.start("-m", "feeder", *words) for words in commands}
    for words, problem in commands.items():
        assert_refused(running[words].wait(), problem)
    fields = lives.status(room)
    assert (fields["strategy"], fields["cache"], fields["slots"]) == ("ring", "4", 4)
    assert fields["engine_pid"] == engine.pid
    ended = engine.wait()
    assert ended.code == 0 and ended.out.split() == long_text[:400]


def test_a_strategy_from_a_file_that_fails_after_a_while(
    room: Room, long_store: Path, long_text: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FAILS_LATER)
    feeder = room.feeder(*lives.feeder_flags(long_store, cache=4, strategy="resident"))
    engine = room.engine(*lives.engine_flags(300))
    lives.until_generating(engine)
    assert lives.status(room)["strategy"] == "resident"
    done = room.start("-m", "feeder", "swap", f"{file}:FailsLater").wait()
    assert done.code == 0 and done.out.startswith("strategy fails-later, 4 weights in"), done
    feeder.until_said("strategy fails-later failed (RuntimeError: had enough)")
    feeder.until_said("going on with on-demand")
    assert lives.status(room)["strategy"] == "on-demand"
    ended = engine.wait()
    assert ended.code == 0 and ended.out.split() == long_text[:300]
    assert "Traceback" not in feeder.err


def test_status_and_stop(room: Room, long_store: Path) -> None:
    total = len(Store.open(long_store).weights)
    feeder = room.feeder(*lives.feeder_flags(long_store, cache=4))
    engine = room.engine(*lives.engine_flags(lives.LONGEST))
    lives.until_generating(engine)
    table = room.start("-m", "feeder", "status")
    as_json = room.start("-m", "feeder", "status", "--json")
    watched = room.start("-m", "feeder", "status", "--watch", "--json")
    rows = {line[:9].strip(): line[10:] for line in table.wait().out.splitlines()}
    assert list(rows) == ["feeder", "store", "strategy", "slots", "hit rate", "link", "engine"]
    assert f"pid {feeder.pid}" in rows["feeder"]
    assert str(long_store) in rows["store"] and f"{total} weights" in rows["store"]
    assert "ring, cache 4: 4 weights in" in rows["strategy"]
    assert "in use" in rows["slots"] and "%" in rows["hit rate"] and "GB/s" in rows["link"]
    assert f"pid {engine.pid}" in rows["engine"] and "stalled" in rows["engine"]
    fields = json.loads(as_json.wait().out)
    assert fields["fingerprint"] == Store.open(long_store).fingerprint
    assert fields["engine_pid"] == engine.pid and fields["engine_stall_s"] >= 0
    states = [fields[f"slots_{s}"] for s in ("filling", "ready", "in_use", "revoked")]
    assert 0 <= sum(states) <= fields["slots"] == 4
    watched.until(lambda: watched.out.count("\n") >= 2, "prints again")
    watched.ctrl_c()
    assert watched.wait().code == 130
    assert json.loads(watched.out.splitlines()[0])["pid"] == feeder.pid
    stopped = room.start("-m", "feeder", "stop").wait()
    assert stopped.code == 0
    assert feeder.popen.wait(PATIENCE_S) == 0  # it has ended when stop returns, but for its parent
    engine.until_said("says goodbye (asked to); waiting for another")
    assert engine.stop().code == 143
    refused = room.start("-m", "feeder", "status").wait()
    assert_refused(refused, "no feeder 'default' is running: start one with")
