"""What users get wrong and the commands find by themselves, before anything heavy is imported: one line
that says what was found, an exit code above 0, and nothing on stdout. Processes: test_mistakes.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import bench.__main__
import feeder.__main__
import feeder.control
import feeder.simulate
import launch
import manual.__main__
import manual.completion

SIMULATE = ["simulate", "--shape=qwen2.5-0.5b", "--link=25", "--device-bandwidth=900"]
WRONG: list[tuple[str, list[str], str]] = [
    ("launch", ["sevre"], "'sevre' is no command: do you mean serve?"),
    ("launch", ["é"], "'é' is no command"),
    ("launch", ["--model="], "--model is empty: give a name"),
    ("launch", ["--prompts="], "--prompts is empty"),
    ("launch", ["--vrma=8GiB"], "unrecognized arguments: --vrma=8GiB: do you mean --vram?"),
    ("launch", ["--top-k=1e3"], "--top-k: invalid int value: '1e3'"),
    ("launch", ["--max-new-tokens="], "--max-new-tokens: invalid int value: ''"),
    ("launch", ["--plan", "--feeder-only"], "--feeder-only: not allowed with argument --plan"),
    ("launch", ["serve", "--port=x"], "--port: invalid int value: 'x'"),
    ("launch", ["serve", "--prompt=x"], "unrecognized arguments: --prompt=x"),
    ("launch", ["chat", "--port=8"], "unrecognized arguments: --port=8"),
    ("launch", ["chat", "x"], "unrecognized arguments: x"),
    ("launch", ["--log-format=xml"], "argument --log-format: invalid choice: 'xml'"),
    ("launch", ["--cache=nan"], "cache 'nan' is not understood"),
    ("launch", ["--cache=1" + "0" * 30], "is not understood: give a number of weights"),
    ("launch", ["--vram=-1GB"], "size '-1GB' is not understood"),
    ("launch", ["--vram=infGB"], "size 'infGB' is not understood"),
    ("launch", ["--speculate=maybe"], "'maybe' is not understood, and no directory: give"),
    ("launch", ["--speculate=lookup:-1"], "with K from 1 to 15"),
    ("launch", ["--speculate=/"], "draft model / has no config.json: give the directory of"),
    ("launch", ["serve", "--batch=2", "--speculate=/"], "--batch 2 and --speculate /: candidates"),
    ("launch", ["--speculate=lookup:0"], "a pass checks from 1 to 15"),
    ("launch", ["--name=" + "a" * 65], "is not usable: give up to 64"),
    ("launch", ["--trace=/nowhere/x"], "trace file /nowhere/x cannot be written"),
    ("launch", ["--trace=FILE"], "exists: remove it, or name another"),
    ("launch", ["--config=/nowhere"], "config file /nowhere cannot be read"),
    ("feeder", ["stauts"], "'stauts' is no command: do you mean status?"),
    ("feeder", ["--model="], "--model is empty"),
    ("feeder", ["--model=x", "--json"], "--json is for --plan"),
    ("control", ["swap"], "the following arguments are required: NAME|FILE:CLASS"),
    ("control", ["swap", "ring", "extra"], "unrecognized arguments: extra"),
    ("control", ["swap", "ring", "--slots=round"], "--slots: invalid choice: 'round'"),
    ("control", ["swap", "ring", "--cache=0"], "cache '0' holds no weight"),
    ("control", ["stop", "--name=é"], "name 'é' is not usable"),
    ("control", ["status"], "no feeder 'default' is running"),
    ("simulate", ["simulate"], "required: --shape, --link, --device-bandwidth"),
    ("simulate", [*SIMULATE, "--shape="], "shape '' is neither a store nor"),
    ("simulate", [*SIMULATE, "--link=nan"], "--link nan: expected above 0 GB/s"),
    ("simulate", [*SIMULATE, "--link=inf"], "--link inf: expected above 0 GB/s"),
    ("simulate", [*SIMULATE, "--engine-us=-5"], "--engine-us -5.0: expected at least 0"),
    ("simulate", [*SIMULATE, "--handover-us=inf"], "--handover-us inf: expected at least 0"),
    ("simulate", [*SIMULATE, "--cache=0"], "cache '0' holds no weight"),
    ("simulate", [*SIMULATE, "--staging=x"], "size 'x' is not understood"),
    ("simulate", [*SIMULATE, "--strategy=best"], "strategy 'best' is not known"),
    ("simulate", [*SIMULATE, "--plot=x.gif"], "expected a name that ends in .png or .svg"),
    ("simulate", [*SIMULATE, "--plot=/nowhere/x.svg"], "/nowhere is no directory"),
    ("bench", [], "the following arguments are required: PART"),
    ("bench", ["swep"], "argument PART: invalid choice: 'swep'"),
    ("bench", ["sweep", "--tokens=1"], "--tokens 1: expected at least 2"),
    ("bench", ["sweep", "--caches=0"], "cache '0' holds no weight"),
    ("bench", ["sweep", "--time-limit=nan"], "--time-limit nan: expected above 0"),
    ("bench", ["sweep", "--prompt-tokens=a"], "--prompt-tokens: invalid numbers value: 'a'"),
    ("bench", ["plot"], "the part plot needs --plot FILE.svg"),
    ("completion", ["tcl"], "invalid choice: 'tcl'"),
    ("manual", ["x"], "unrecognized arguments: x"),
]
MAINS: dict[str, Callable[[list[str]], int]] = {
    "launch": launch.main,
    "feeder": feeder.__main__.main,
    "control": feeder.control.main,
    "simulate": feeder.simulate.main,
    "bench": bench.__main__.main,
    "completion": manual.completion.main,
    "manual": manual.__main__.main,
}


@pytest.mark.parametrize(("command", "argv", "message"), WRONG, ids=lambda it: str(it)[:50])
def test_one_line(
    command: str,
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    for variable in ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(runtime))
    monkeypatch.setenv("PYTHONPATH", "")  # which the launcher sets for its children
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    there = tmp_path / "there"
    there.write_text("x")
    try:
        code: object = MAINS[command]([word.replace("FILE", str(there)) for word in argv])
    except SystemExit as ended:
        code = ended.code
    said = capfd.readouterr()
    assert code in (1, 2)
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    assert message in said.err
    assert there.read_text() == "x" and not any(runtime.rglob("*"))  # nothing is left behind
