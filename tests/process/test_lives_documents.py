"""The example of docs/strategies.md, as it stands there, in a feeder and in the simulator."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common import protocol as p
from common.store import Store
from feeder.strategies.registry import make_strategy
from tests import lives
from tests.processes import ROOT, Room

pytestmark = pytest.mark.usefixtures("device_as_before")


@pytest.fixture
def example(tmp_path: Path) -> Path:
    text = (ROOT / "docs" / "strategies.md").read_text()
    (code,) = re.findall(r"<!-- example -->\n```python\n(.*?)^```$", text, re.M | re.S)
    assert code.count("\n") < 40
    file = tmp_path / "keep_largest.py"
    file.write_text(code)
    return file


def test_the_example_in_a_feeder(
    room: Room, long_store: Path, long_text: list[str], example: Path
) -> None:
    weights = Store.open(long_store).weights
    feeder = room.feeder(*lives.feeder_flags(long_store, 9, f"{example}:KeepLargest"))
    engine = room.engine(*lives.engine_flags(300))
    lives.until_generating(engine)
    start = lives.status(room)
    assert start["strategy"] == "keep-largest" and start["slots"] == 9
    engine.until(lambda: lives.status(room)["passes"] >= start["passes"] + 3, "makes 3 passes")
    fields = lives.status(room)
    assert 0 < fields["standing"] <= 5
    assert fields["hit_rate"] >= fields["standing"] / len(weights) - 1e-9
    answer = lives.ask(room, p.Swap("ring", ""))
    assert isinstance(answer, p.Done)
    answer = lives.ask(room, p.Swap(f"{example}:KeepLargest", ""))
    assert isinstance(answer, p.Done) and answer.text.startswith("strategy keep-largest, 9 weights")
    ended = engine.wait()
    assert ended.code == 0 and ended.out.split() == long_text[:300], ended.err
    assert "failed" not in feeder.err


def test_the_example_in_the_simulator(room: Room, example: Path) -> None:
    assert make_strategy(f"{example}:KeepLargest").name == "keep-largest"
    text = (ROOT / "docs" / "strategies.md").read_text()
    commands = re.findall(r"^python (-m feeder simulate .*)$", text, re.M)
    assert len(commands) == 2
    hits = []
    for command in commands:
        words = command.replace("keep_largest.py", str(example)).split()
        ended = room.start(*words).wait()
        assert ended.code == 0, ended.err
        found = re.search(r"^ *128 .*? ([\d.]+) %", ended.out, re.M)
        assert found is not None, ended.out
        hits.append(float(found[1]))
    assert hits[0] == pytest.approx(hits[1], abs=1.0) == pytest.approx(100 * 124 / 449, abs=1.0)
