"""Verify mode, moment by moment: each check is the only one that can see what was written."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from common import protocol as p
from common.errors import SlotCorruptError
from tests import fed, lives
from tests.processes import SHARED, Room

pytestmark = pytest.mark.usefixtures("device_as_before")
reaches_slots = pytest.mark.skipif(
    lives.DEVICE != "cpu", reason="reaches into the slots through /proc"
)


@pytest.mark.parametrize("slots", lives.SLOTS)
def test_a_fill_from_a_damaged_host_store(
    room: Room, long_store: Path, long_text: list[str], slots: str
) -> None:
    before, name = room.shared_entries(), room.name
    flags = lives.feeder_flags(long_store, 2, "ring", slots)
    feeder = room.feeder(*flags, "--verify", "--keep-store", name=name)
    (entry,) = room.shared_entries() - before
    tokens = lives.LONGEST // 2
    engine = room.engine(*lives.engine_flags(tokens), f"--name={name}")
    lives.until_generating(engine)
    lives.damage(SHARED / entry)
    feeder.until(
        lambda: "error: verify at fill" in feeder.err or engine.popen.poll() is not None,
        "finds the damage",
    )
    assert engine.popen.poll() is None, "the generation is too short: it ended before a fill"
    assert feeder.wait().code == 1
    assert "error: verify at fill: model.layers.0." in feeder.err
    # No token came of what was filled wrong, and the next feeder loads the store anew.
    feeder = room.feeder(*lives.feeder_flags(long_store, -1, slots=slots), name=name)
    ended = engine.wait()
    assert ended.code == 0 and ended.out.split() == long_text[:tokens], ended.err
    lives.stop(room, feeder, name)
    assert room.shared_entries() == before


@reaches_slots
def test_an_engine_checks_what_it_is_granted_and_what_it_releases(
    room: Room, long_store: Path
) -> None:
    feeder = room.feeder(*lives.feeder_flags(long_store, -1))
    with fed.connected(room, feeder, verify=True) as engine:
        lease = engine.client.acquire(3)
        lives.corrupt(feeder)
        with pytest.raises(SlotCorruptError, match=r"verify at release: .+ in slot \d+"):
            engine.client.release(lease)
        lives.corrupt(feeder)
        engine.client.release(lease)
        lives.corrupt(feeder)
        with pytest.raises(SlotCorruptError, match=r"verify at grant: .+ in slot \d+"):
            engine.client.acquire(3)


@reaches_slots
def test_a_feeder_checks_what_comes_back(room: Room, long_store: Path) -> None:
    feeder = room.feeder(*lives.feeder_flags(long_store, 2, "on-demand"), "--verify")
    with fed.connected(room, feeder) as engine:
        lease = engine.client.acquire(5)
        feeder.signal(signal.SIGSTOP)
        engine.client.release(lease)  # to the engine it looks right
        lives.corrupt(feeder)
        feeder.signal(signal.SIGCONT)
        assert feeder.wait().code == 1
        assert f"error: verify at release: {engine.store.weights[5].name} in slot" in feeder.err


def test_what_is_freed_is_poisoned(room: Room, long_store: Path) -> None:
    feeder = room.feeder(*lives.feeder_flags(long_store, 1, "on-demand"), "--verify")
    with fed.connected(room, feeder) as engine:
        sizes = [weight.elements for weight in engine.store.weights]
        large, small = sizes.index(max(sizes)), sizes.index(min(sizes))
        lease = engine.client.acquire(large)
        left = lease.data  # the same memory holds a smaller weight soon
        assert int((left == 0xFF).sum()) < left.numel() // 2
        engine.client.release(lease)
        other = engine.client.acquire(small)
        assert engine.holds(other, small)
        assert int((left == 0xFF).sum()) >= left.numel() - other.grant.size_bytes
        engine.client.release(other)
    assert isinstance(lives.ask(room, p.Stop()), p.Done)
