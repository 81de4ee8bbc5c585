"""Feeder and engine started one by one, in either order; what a dead one leaves; verify mode."""

from __future__ import annotations

import re
import shlex
import signal
import stat
from pathlib import Path

import pytest

from common.store import Store
from tests import lives
from tests.processes import Room, assert_refused, lock_holder

pytestmark = pytest.mark.usefixtures("device_as_before")


def test_either_order_and_one_after_the_other(
    room: Room, long_store: Path, long_text: list[str]
) -> None:
    # The engine first: it says what it waits for, and its advice works.
    engine = room.engine("--name=mine", *lives.engine_flags(60))
    engine.until_said("waiting for a feeder called 'mine'; start one with: ")
    for directory in (room.directory("mine"), room.directory("mine").parent):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    advice = re.search(r"start one with: python (.*)", engine.err)
    assert advice is not None and "--model STORE" in advice[1]
    words = shlex.split(advice[1].replace("STORE", shlex.quote(str(long_store))))
    others = [
        one for one in lives.feeder_flags(long_store) if one.startswith(("--device", "--slots"))
    ]
    feeder = room.start(*words, *others)
    ended = engine.wait()
    assert ended.code == 0 and ended.out.split() == long_text[:60], ended.err
    assert engine.err.count("waiting for a feeder") == 1
    # All weights lie in slots now: for the next engine nothing is loaded, pinned or filled.
    before = lives.status(room, "mine")
    assert before["fills"] == len(Store.open(long_store).weights)
    second = room.engine("--name=mine", *lives.engine_flags(60)).wait()
    assert second.code == 0 and second.out.split() == long_text[:60]
    assert "waiting" not in second.err
    after = lives.status(room, "mine")
    assert (after["pid"], after["fills"]) == (feeder.pid, before["fills"])
    assert feeder.err.count("serving") == 1
    # Nobody else may have the name, and the living one does not mind.
    refused = room.start("-m", "feeder", "--name=mine", f"--model={long_store}").wait()
    assert_refused(refused, f"feeder 'mine' runs already, pid {feeder.pid}: end that one", code=2)
    assert lives.status(room, "mine")["pid"] == feeder.pid
    # What a killed one leaves is cleaned up and used again.
    feeder.signal(signal.SIGKILL)
    feeder.popen.wait()
    assert (room.directory("mine") / "feeder.sock").exists()
    assert lock_holder(room, "feeder", "mine") is None
    room.directory("mine").joinpath("feeder.sock").unlink()  # to see that it is made again
    next_feeder = room.feeder(*lives.feeder_flags(long_store), name="mine")
    assert lock_holder(room, "feeder", "mine") == next_feeder.pid
    third = room.engine("--name=mine", *lives.engine_flags(60)).wait()
    assert third.code == 0 and third.out.split() == long_text[:60]


def test_a_socket_that_a_killed_feeder_left(room: Room, long_store: Path) -> None:
    feeder = room.feeder(*lives.feeder_flags(long_store))
    feeder.signal(signal.SIGKILL)
    feeder.popen.wait()
    left = (room.directory() / "feeder.sock").stat().st_ctime_ns
    successor = room.start("-m", "feeder", *lives.feeder_flags(long_store))
    successor.until_said("serving")
    assert (room.directory() / "feeder.sock").stat().st_ctime_ns != left
    assert lives.status(room)["pid"] == successor.pid
    lives.stop(room, successor)
    assert not room.leftovers()


NAMED = r"error: verify at (\w+): ((?:model|lm_head)\S*) in slot \d+, generation \d+, has checksum"


@pytest.mark.parametrize("slots", lives.SLOTS)
def test_verify_mode_finds_nothing_when_all_is_well(
    room: Room, long_store: Path, long_text: list[str], slots: str
) -> None:
    flags = lives.feeder_flags(long_store, 4, "resident", slots)
    room.feeder(*flags, "--verify")
    room.feeder(*flags, name="checked")
    engines = [
        room.engine(*lives.engine_flags(40)),
        room.engine("--name=checked", "--verify", *lives.engine_flags(40)),
    ]
    for engine in engines:
        ended = engine.wait()
        assert ended.code == 0 and ended.out.split() == long_text[:40], ended.err


@pytest.mark.skipif(lives.DEVICE != "cpu", reason="reaches into the slots through /proc")
@pytest.mark.parametrize("slots", lives.SLOTS)
def test_verify_mode_stops_at_a_slot_that_was_written_to(
    room: Room, long_store: Path, long_text: list[str], slots: str
) -> None:
    names = {weight.name for weight in Store.open(long_store).weights}

    def check(text: str, moments: set[str]) -> None:
        lines = [line for line in text.splitlines() if line.startswith("error:")]
        found = re.match(NAMED, lines[0])
        assert found is not None, lines
        assert len(lines) == 1 and found[1] in moments and found[2] in names
        assert "Traceback" not in text

    # The engine alone verifies: what stays was right, and is no more.
    feeder = room.feeder(*lives.feeder_flags(long_store, -1, slots=slots))
    engine = room.engine("--verify", *lives.engine_flags(lives.LONGEST))
    lives.until_generating(engine)
    lives.corrupt(feeder)
    ended = engine.wait()
    assert ended.code == 1
    check(ended.err, {"grant", "release"})
    said = ended.out.split()
    assert said[:-1] == long_text[: len(said) - 1]  # nothing that is wrong was said before
    lives.stop(room, feeder)
    # The feeder verifies: it does not grant what was written to between two engines.
    feeder = room.feeder(*lives.feeder_flags(long_store, -1, slots=slots), "--verify")
    assert room.engine(*lives.engine_flags(10)).wait().code == 0
    lives.corrupt(feeder)
    engine = room.engine(*lives.engine_flags(50))
    stopped = feeder.wait()
    assert stopped.code == 1
    check(stopped.err, {"grant"})
    room.feeder(
        *lives.feeder_flags(long_store, -1, slots=slots)
    )  # the engine has lost it, and goes on
    ended = engine.wait()
    assert ended.code == 0 and ended.out.split() == long_text[:50], ended.err
