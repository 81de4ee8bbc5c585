"""`bench.kinds` on the demo pair: real runs, whose texts are the same and with and without candidates."""

from __future__ import annotations

import json
from pathlib import Path

from tests.processes import Room


def test_sums_of_the_demo_pair(room: Room, tmp_path: Path) -> None:
    output = tmp_path / "kinds.json"
    flags = ("--prompts=2", "--rounds=1", "--device=cpu", f"--output={output}")
    ended = room.start("-m", "bench.kinds", *flags).wait()
    assert ended.code == 0, ended.err
    result = json.loads(output.read_text())
    assert json.loads(ended.out) == result
    assert result["circumstances"]["command"].startswith("python -m bench.kinds ")
    found = result["kinds"]["arithmetic"]
    assert found["as_expected"] == 1.0  # the demo's sums are right
    assert all(found[mode]["same_text"] for mode in ("off", "lookup", "draft"))
    assert found["off"]["tokens_per_pass"] == 1.0 and found["off"]["candidates"] == 0
    for mode in ("lookup", "draft"):  # how many passes that saves, depends on what they take
        assert found[mode]["candidates"] > 0 and 0 <= found[mode]["acceptance"] <= 1
        assert found[mode]["tokens_per_pass"] >= 1.0
        assert found[mode]["tokens"] == found["off"]["tokens"]
    assert found["lookup"]["drafted_share"] == 0
