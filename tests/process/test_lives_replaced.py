"""Either process is killed, stopped or replaced in the middle of a token; the text stays the same."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from common import protocol as p
from common.store import Store
from feeder.quantize import quantize_checkpoint
from tests import fed, lives
from tests.checkpoints import make_checkpoint
from tests.processes import SHARED, Process, Room, lock_holder, until

pytestmark = pytest.mark.usefixtures("device_as_before")

FEEDER_KILLS = lives.count(4, 50)
ENGINE_KILLS = lives.count(3, 50)
CACHES = ["1", "2", "5", "9", "-1", "300KB"]


def kill(process: Process) -> None:
    process.signal(signal.SIGKILL)
    assert process.popen.wait() == -signal.SIGKILL


def seconds_until_said(process: Process, text: str, times: int) -> float:
    """How long it takes until a process has written ``text`` so many times."""
    start = time.monotonic()
    process.until(lambda: process.err.count(text) >= times, f"says {text!r} {times} times")
    return time.monotonic() - start


def test_feeders_killed_at_random_moments(
    room: Room, long_store: Path, long_text: list[str]
) -> None:
    generator = random.Random(11)
    tokens = lives.count(500, lives.LONGEST)
    feeders = lives.Ahead(room, "feeder", FEEDER_KILLS + 1)
    used: set[str] = set()

    def next_feeder() -> Process:
        cache, strategy = generator.choice(CACHES), generator.choice(lives.STRATEGIES)
        slots = generator.choice(lives.SLOTS)
        used.add(slots)
        feeder = feeders.begin(*lives.feeder_flags(long_store, cache, strategy, slots))
        lives.wait_until_serving(room, feeder)
        return feeder

    feeder = next_feeder()
    engine = room.engine(*lives.engine_flags(tokens))
    lives.until_generating(engine)
    noticed = []
    for number in range(1, FEEDER_KILLS + 1):
        lives.pause(generator.random() * 0.25)
        assert engine.popen.poll() is None, f"the generation is too short for kill {number}"
        said = f"feeder {feeder.pid} has ended; waiting for another"
        kill(feeder)
        noticed.append(seconds_until_said(engine, said, 1))
        feeder = next_feeder()
        engine.until_said(f"feeder {feeder.pid} takes over; going on")
    lives.ask(room, p.Swap("resident", "-1", ""))  # the last may be the slowest there is
    ended = engine.wait()
    assert ended.code == 0, ended.err
    assert ended.out.split() == long_text[:tokens]
    assert used == {*lives.SLOTS}
    # Within a second, and usually: what a busy machine adds is not the engine's.
    assert sorted(noticed)[len(noticed) // 2] < 1.0, noticed
    fields = lives.status(room)
    assert fields["engine_pid"] == 0 and lives.held(fields) == 0


def test_feeders_killed_as_they_start(room: Room, long_store: Path, long_text: list[str]) -> None:
    """Each is killed as soon as the engine can have met it: before, while or after it is welcomed."""
    generator = random.Random(12)
    kills = lives.count(3, 20)
    feeders = lives.Ahead(room, "feeder", kills + 1)
    engine = room.engine(*lives.engine_flags(200))
    engine.until_said("waiting for a feeder called 'default'")
    for _ in range(kills):
        feeder = feeders.begin(*lives.feeder_flags(long_store, 3))
        socket = room.directory() / "feeder.sock"
        socket.unlink(missing_ok=True)  # its killed predecessor's, which would be taken for its own
        feeder.until(socket.exists, "listens")
        lives.pause(generator.random() * 0.01)
        kill(feeder)
        assert engine.popen.poll() is None, engine.err
    room.feeder(*lives.feeder_flags(long_store, 3))
    ended = engine.wait()
    assert ended.code == 0, ended.err
    assert ended.out.split() == long_text[:200]


def test_a_polite_successor_and_one_with_another_store(
    room: Room, long_store: Path, long_text: list[str], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", hidden=128, intermediate=192, seed=9)
    quantize_checkpoint(checkpoint, tmp_path / "store", "cpu", progress=False)
    ours, others = (Store.open(path).fingerprint for path in (long_store, tmp_path / "store"))
    assert ours != others
    feeder = room.feeder(*lives.feeder_flags(long_store))
    engine = room.engine(*lives.engine_flags(300))
    lives.until_generating(engine)
    lives.stop(room, feeder)
    engine.until_said(f"feeder {feeder.pid} says goodbye (asked to); waiting for another")
    wrong = room.feeder(*lives.feeder_flags(tmp_path / "store"))
    refusal = f"refused feeder {wrong.pid}: "
    engine.until_said(refusal)
    line = next(line for line in engine.err.splitlines() if refusal in line)
    assert ours in line and others in line and "waiting for another" in line
    lives.pause(1.5)  # it does not ask the same one again and again
    assert engine.err.count(refusal) == 1
    assert lives.status(room)["engine_pid"] == 0
    lives.stop(room, wrong)
    right = room.feeder(*lives.feeder_flags(long_store, 2, "resident"))
    engine.until_said(f"feeder {right.pid} takes over; going on")
    ended = engine.wait()
    assert ended.code == 0 and ended.out.split() == long_text[:300], ended.err


def test_engines_killed_at_random_moments(
    room: Room, long_store: Path, long_text: list[str]
) -> None:
    generator = random.Random(13)
    feeder = room.feeder(*lives.feeder_flags(long_store, 5, "resident"))
    engines = lives.Ahead(room, "engine", ENGINE_KILLS + 1)
    for number in range(1, ENGINE_KILLS + 1):
        engine = engines.begin(*lives.engine_flags(lives.LONGEST))
        lives.until_generating(engine)
        lives.pause(generator.random() * 0.2)
        kill(engine)
        assert engine.popen.returncode == -signal.SIGKILL
        said = f"engine {engine.pid} has ended; its slots are ready again"
        feeder.until_said(said)
        fields = lives.status(room)
        assert fields["engine_pid"] == 0 and fields["passes"] > 0
        assert lives.held(fields) == 0, number
        assert long_text[: len(engine.out.split()) - 1] == engine.out.split()[:-1]
    survivor = engines.begin(*lives.engine_flags(300))
    ended = survivor.wait()
    assert ended.code == 0 and ended.out.split() == long_text[:300], ended.err
    # It was there all the time, loaded once, and what stays was filled once for all engines.
    assert feeder.err.count("serving") == 1
    assert feeder.err.count("is here") == ENGINE_KILLS + 1
    lives.stop(room, feeder)


def test_a_feeder_stopped_while_it_is_asked(
    room: Room, long_store: Path, long_text: list[str]
) -> None:
    """The engine repeats its hello to a feeder that does not answer, and is answered once."""
    feeder = room.feeder(*lives.feeder_flags(long_store))
    feeder.signal(signal.SIGSTOP)
    engine = room.start("-m", "engine", *lives.engine_flags(50), "--verbose")
    until((room.directory() / "engine.lock").exists, lambda: "the engine does not start")
    lives.pause(6 if lives.DEVICE == "cpu" else 12)  # transformers, and then some hellos
    feeder.signal(signal.SIGCONT)
    ended = engine.wait()
    assert ended.code == 0 and ended.out.split() == long_text[:50], ended.err
    assert feeder.err.count("is here") == 1


def test_the_host_store_survives_its_feeder(
    room: Room, long_store: Path, long_text: list[str]
) -> None:
    name = room.name
    before = room.shared_entries()
    kept = room.feeder(*lives.feeder_flags(long_store), "--keep-store", name=name)
    assert "used again" not in kept.err
    (entry,) = room.shared_entries() - before
    inode = os.stat(f"/dev/shm/{entry}").st_ino
    engine = room.engine(*lives.engine_flags(300), f"--name={name}")
    lives.until_generating(engine)
    kill(kept)
    engine.until_said("waiting for another")
    assert room.shared_entries() - before == {entry}
    second = room.feeder(*lives.feeder_flags(long_store, 2), "--keep-store", name=name)
    second.until_said("the host store that a former feeder kept is used again")
    assert os.stat(f"/dev/shm/{entry}").st_ino == inode
    engine.until_said(f"feeder {second.pid} takes over")
    lives.stop(room, second, name)
    assert room.shared_entries() - before == {entry}
    last = room.feeder(*lives.feeder_flags(long_store, 3), name=name)
    last.until_said("the host store that a former feeder kept is used again")
    ended = engine.wait()
    assert ended.code == 0 and ended.out.split() == long_text[:300], ended.err
    lives.stop(room, last, name)
    assert room.shared_entries() == before


def test_a_kept_host_store_that_was_damaged(
    room: Room, long_store: Path, long_text: list[str]
) -> None:
    name, before = room.name, room.shared_entries()
    lives.stop(room, room.feeder(*lives.feeder_flags(long_store), "--keep-store", name=name), name)
    (entry,) = room.shared_entries() - before
    lives.damage(SHARED / entry)
    feeder = room.feeder(*lives.feeder_flags(long_store), name=name)
    feeder.until_said("the host store that a former feeder kept is damaged: model.layers.0.")
    ended = room.engine(*lives.engine_flags(20), f"--name={name}").wait()
    assert ended.code == 0 and ended.out.split() == long_text[:20], ended.err
    lives.stop(room, feeder, name)
    assert room.shared_entries() == before


def test_feeders_that_stand_by(room: Room, long_store: Path, long_text: list[str]) -> None:
    """One takes over from one that is killed, another from that when it is told to end. Each has the host
    store at hand by then, for as long as it is kept."""
    flags, name, before = lives.feeder_flags(long_store), room.name, room.shared_entries()
    first = room.feeder(*flags, "--keep-store", name=name)
    (entry,) = room.shared_entries() - before

    def stand_by(*more: str) -> Process:
        return room.start("-m", "feeder", *flags, f"--name={name}", "--standby", *more)

    def until_mapped(feeder: Process, mapped: bool = True) -> None:
        maps = Path(f"/proc/{feeder.pid}/maps")
        feeder.until(lambda: (entry in maps.read_text()) == mapped, f"maps it: {mapped}")

    others = [stand_by("--keep-store"), stand_by("--keep-store"), stand_by()]
    for one in others:
        one.until_said(f"standing by for feeder '{name}', pid {first.pid}")
        until_mapped(one)
    assert lock_holder(room, "feeder", name) == first.pid
    engine = room.engine(*lives.engine_flags(40), f"--name={name}")
    lives.until_generating(engine)
    kill(first)
    assert engine.wait().out.split() == long_text[:40]
    # Which of them it is, nobody knows.
    until(lambda: any("serving" in one.err for one in others), lambda: "none serves")
    (spare,) = [one for one in others if "serving" in one.err]
    others.remove(spare)
    for one in others:
        one.until_said(f"standing by for feeder '{name}', pid {spare.pid}")
    # One that does not keep it takes the name away.
    (SHARED / entry).unlink(missing_ok=True)
    for one in others:
        until_mapped(one, False)
    lives.stop(room, spare, name)
    until(lambda: any("serving" in one.err for one in others), lambda: "none serves")
    (last,) = [one for one in others if "serving" in one.err]
    others.remove(last)
    assert "used again" in spare.err and "used again" not in last.err
    assert others[0].stop().code == 128 + signal.SIGTERM
    ended = room.engine(*lives.engine_flags(40), f"--name={name}").wait()
    assert ended.code == 0 and ended.out.split() == long_text[:40], ended.err
    lives.stop(room, last, name)
    # Where nobody is, there is nobody to wait for; and what was kept is not kept for ever.
    alone = room.feeder(*flags, "--standby", name=name)
    assert "standing by" not in alone.err
    lives.stop(room, alone, name)
    assert room.shared_entries() == before


def test_a_feeder_that_stands_by_for_a_damaged_store(
    room: Room, long_store: Path, long_text: list[str]
) -> None:
    flags, name, before = lives.feeder_flags(long_store), room.name, room.shared_entries()
    first = room.feeder(*flags, "--keep-store", name=name)
    (entry,) = room.shared_entries() - before
    lives.damage(SHARED / entry)
    spare = room.start("-m", "feeder", *flags, f"--name={name}", "--standby")
    spare.until_said(f"the host store that feeder '{name}' has is damaged: model.layers.0.")
    kill(first)
    spare.until_said("loading again")
    spare.until_said("serving")
    ended = room.engine(*lives.engine_flags(20), f"--name={name}").wait()
    assert ended.code == 0 and ended.out.split() == long_text[:20], ended.err
    lives.stop(room, spare, name)
    assert room.shared_entries() == before


def test_how_long_a_feeder_was_absent(room: Room, long_store: Path) -> None:
    """So that a pass that waited for another is not taken to be a slow one."""
    feeder = room.feeder(*lives.feeder_flags(long_store, 2))
    with fed.connected(room, feeder) as engine:

        def use_all() -> float:
            for weight in range(len(engine.store.weights)):
                engine.client.release(engine.client.acquire(weight))
            return engine.client.absent_s

        assert use_all() == 0.0
        kill(feeder)
        start = time.monotonic()
        room.start("-m", "feeder", *lives.feeder_flags(long_store, 2))
        absent_s, took = use_all(), time.monotonic() - start
        assert 0.5 * took < absent_s <= took + 0.5
        assert use_all() == absent_s
        assert engine.client.lost_feeders == 1
