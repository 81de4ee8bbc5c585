"""Settings and logs of a whole run: the launcher reads them, its children do as it found."""

from __future__ import annotations

import json
from pathlib import Path

from tests.processes import Room


def test_a_run_by_its_settings_with_logs_for_programs(room: Room, demo_store: Path) -> None:
    config = room.path / "config" / "weight-feeder" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(
        f'model = "{demo_store}"\ncache = 30\nlog-format = "json"\nverify = true\n'
        "[run]\nmax-new-tokens = 200\n[feeder]\ncache = 5\n[serve]\nport = 1\n"
    )
    room.environment["WEIGHT_FEEDER_MAX_NEW_TOKENS"] = "4"
    room.environment["WEIGHT_FEEDER_STRATEGY"] = "ring"
    ended = room.launch("--prompt=1.1+2.3=?", "--strategy=resident").wait()
    assert ended.code == 0, ended.err
    assert ended.out == "001.\n"  # four tokens, as the variable says
    lines = [json.loads(line) for line in ended.err.splitlines()]
    for line in lines:
        assert line.keys() >= {"time", "level", "process", "pid", "message"}
        assert line["time"].endswith("Z") and line["level"] == "info"
    (summary,) = (line for line in lines if line["message"] == "summary")
    assert summary["process"] == "engine" and summary["tokens"] == 4
    assert (summary["strategy"], summary["cache"]) == ("resident", "30")  # the flag, and the top
    assert {line["process"] for line in lines} == {"engine", "feeder"}
    wrong = room.launch("--prompts=/nowhere").wait()
    assert wrong.code == 2 and wrong.out == ""
    last = json.loads(wrong.last_line)
    assert (last["level"], last["exit_code"]) == ("error", 2)
    assert last["message"].startswith("engine: prompts file /nowhere cannot be read: No such file")
