"""The engine's figures, when feeders come and go under it."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path

import pytest

from common.errors import WeightFeederError
from engine.client import WeightClient
from engine.report import Report
from tests import fed, stores
from tests.processes import Room, until

TOTAL = len(stores.LINEAR)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stores.write_store(tmp_path_factory.mktemp("store") / "store")


def use_all(client: WeightClient, passes: int) -> None:
    """Use every weight, and wait until the feeder has nothing more to fill."""
    for _ in range(passes):
        for weight in range(TOTAL):
            client.release(client.acquire(weight))
    until(
        lambda: (status := client.ask_status())["slots_ready"] + status["slots_in_use"] == 1,
        lambda: f"still filling: {client.ask_status()}",
    )


def test_the_summary_counts_what_every_feeder_streamed(room: Room, store: Path) -> None:
    with fed.engine(room, store, "--cache=1") as engine:
        client = engine.client
        use_all(client, 1)
        report = Report(client)
        before = int(client.ask_status()["streamed_bytes"])
        use_all(client, 3)
        report.token()  # asks, and does not wait for the answer
        first = int(client.ask_status()["streamed_bytes"]) - before
        assert first >= 3 * engine.store.packed_bytes - before
        engine.feeder.popen.kill()
        engine.feeder.popen.wait()
        second = room.feeder("--model", store, "--cache=1")
        use_all(client, 2)
        summary = report.summary()
        said = int(client.ask_status()["streamed_bytes"])
        assert said >= 2 * engine.store.packed_bytes - before
        assert summary["streamed_bytes"] == first + said
        second.stop()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_live_line_leaves_errors_to_the_main_thread(
    room: Room, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a second engine has taken the feeder that came after the first one's."""
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with fed.engine(room, store, "--cache=2") as engine:
        ours = Report(engine.client)
        engine.feeder.popen.kill()
        engine.feeder.popen.wait()
        other = WeightClient(room.directory())
        theirs = Report(other)  # which has no feeder to ask
        with ours, theirs:
            until(lambda: "tok/s" in terminal.getvalue(), lambda: "no live line")
            room.feeder("--model", store, "--cache=2")
            clients = (engine.client, other)
            with pytest.raises(WeightFeederError, match="serves the engine with pid"):
                for turn in range(2000):
                    clients[turn % 2].ask_status(0.05)
            until(
                lambda: sum(t.name == "live-line" for t in threading.enumerate()) == 1,
                lambda: "the line goes on",
            )
        other.close()
    assert raised == []
