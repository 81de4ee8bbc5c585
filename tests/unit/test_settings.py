"""Values for flags: the command line before the environment before the file before the default."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import launch
from common import log
from common.arguments import as_flags
from common.parser import Parser
from common.settings import COMMANDS


@pytest.fixture(autouse=True)
def nobodys_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings but those that a test makes."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("WEIGHT_FEEDER_CONFIG", "WEIGHT_FEEDER_LEASH"):
        monkeypatch.delenv(name, raising=False)


def own_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config" / "weight-feeder" / "config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def parse(command: str, *argv: str) -> Any:
    return launch.make_parser(command)[0].parse_args(list(argv))


def refused(capsys: pytest.CaptureFixture[str], command: str, *argv: str) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as ended:
        parse(command, *argv)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    return said.err


@given(
    flag=st.booleans(),
    own=st.booleans(),
    general=st.booleans(),
    table=st.booleans(),
    top=st.booleans(),
)
def test_what_comes_before_what(
    flag: bool, own: bool, general: bool, table: bool, top: bool
) -> None:
    import tempfile

    sources = [(flag, 1), (own, 2), (general, 3), (table, 4), (top, 5), (True, 8000)]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        text = ("port = 5\n" if top else "") + ("[serve]\nport = 4\n" if table else "")
        own_file(Path(directory), text)
        patch.setenv("XDG_CONFIG_HOME", f"{directory}/config")
        if own:
            patch.setenv("WEIGHT_FEEDER_SERVE_PORT", "2")
        if general:
            patch.setenv("WEIGHT_FEEDER_PORT", "3")
        found = parse("serve", *(["--port=1"] if flag else []))
    assert found.port == next(value for there, value in sources if there)


def test_a_file_says_what_flags_say(tmp_path: Path) -> None:
    own_file(
        tmp_path,
        'model = "/x"\ncache = 32\nno-step = true\ntemperature = 0.5\nmax_new_tokens = 7\n'
        '[serve]\nport = 1\n[swap]\ncache = "3"\n',
    )
    parser, feeder, engine, both = launch.make_parser("")
    from_file = parser.parse_args([])
    from_flags = launch.make_parser("")[0].parse_args(
        [
            "--config=",
            "--model=/x",
            "--cache=32",
            "--no-step",
            "--temperature=0.5",
            "--max-new-tokens=7",
        ]
    )
    assert vars(from_file) | {"config": ""} == vars(from_flags)
    # The launcher hands on what it found.
    flags = as_flags(from_file, [*feeder, *engine, *both])
    assert flags == ["--cache=32", "--max-new-tokens=7", "--temperature=0.5", "--no-step"]


def test_the_environment_takes_back_what_the_file_turns_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_file(tmp_path, "verify = true\n")
    assert parse("").verify
    for no in ("0", "false", "No", "off"):
        monkeypatch.setenv("WEIGHT_FEEDER_VERIFY", no)
        assert not parse("").verify
    monkeypatch.setenv("WEIGHT_FEEDER_VERIFY", "")  # says nothing
    assert parse("").verify


def test_only_what_is_meant_for_a_command_reaches_it(tmp_path: Path) -> None:
    from feeder import control

    own_file(tmp_path, 'cache = "5"\nname = "mine"\n')
    found = control.make_parser("swap").parse_args(["ring"])
    assert (found.cache, found.name) == ("", "mine")
    own_file(tmp_path, '[swap]\ncache = "5"\n')
    assert control.make_parser("swap").parse_args(["ring"]).cache == "5"


def test_a_required_flag_may_be_a_setting(tmp_path: Path) -> None:
    from feeder.__main__ import make_parser

    own_file(tmp_path, 'model = "/some/store"\n')
    assert make_parser().parse_args([]).model == "/some/store"


def test_under_a_launcher_only_flags_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from feeder.__main__ import make_parser

    own_file(tmp_path, 'nonsense = "x"\ncache = 5\n')
    monkeypatch.setenv("WEIGHT_FEEDER_LEASH", "99")
    monkeypatch.setenv("WEIGHT_FEEDER_CACHE", "6")
    assert make_parser().parse_args(["--model=x"]).cache == "auto"


def test_flags_that_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own_file(tmp_path, "plan = true\n")
    assert parse("").plan
    found = parse("", "--feeder-only")  # the command line's holds
    assert found.feeder_only and not found.plan
    assert "not allowed with argument" in refused(capsys, "", "--feeder-only", "--plan")
    own_file(tmp_path, "plan = true\nfeeder-only = true\n")
    said = refused(capsys, "")
    assert f"{path}: feeder-only and {path}: plan exclude each other" in said


WRONG = {
    "cash = 5": "cash is not known: do you mean cache?",
    "[serv]\nport = 1": "[serv] is no command: do you mean serve?",
    "[serve]\nprot = 1": "serve.prot is not known: do you mean port?",
    "wombat = 1": "wombat is not known (",
    "help = true": "help is not known",
    'port = "many"': "port: 'many' found: expected a whole number",
    "port = 1.5": "port: 1.5 found: expected a whole number",
    "port = true": "port: True found: expected a number or a text",
    "port = [1]": "port: [1] found: expected a number or a text",
    'slots = "round"': "slots: 'round' found: expected one of auto, packed, dequantized",
    'verify = "perhaps"': "verify: 'perhaps' found: expected true or false",
    "verify = 2": "verify: 2 found: expected true or false",
    "cache = ": "is not TOML: ",
    "cache = 1\ncache = 2": "is not TOML: ",
    '"é" = 1': "é is not known",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_a_file_may_not_say(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_file(tmp_path, text + "\n")
    said = refused(capsys, "serve")
    assert WRONG[text] in said and str(path) in said


def test_files_that_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own_file(tmp_path, "nonsense")
    assert parse("", "--config=").cache == "auto"  # none is wanted
    monkeypatch.setenv("WEIGHT_FEEDER_CONFIG", "")
    assert parse("").cache == "auto"
    monkeypatch.delenv("WEIGHT_FEEDER_CONFIG")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("nowhere", "cannot be read: No such file"),
        (".", "cannot be read: Is a directory"),
        ("bytes", "is not TOML: "),
        ("a\0b", "null byte"),
    ):
        assert message in refused(capsys, "", "--config", str(tmp_path / name))
    monkeypatch.setenv("WEIGHT_FEEDER_CONFIG", str(tmp_path / "nowhere"))
    assert "cannot be read" in refused(capsys, "")


def test_a_variable_that_is_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WEIGHT_FEEDER_SEED", "many")
    assert "WEIGHT_FEEDER_SEED: 'many' found: expected a whole number" in refused(capsys, "")
    monkeypatch.delenv("WEIGHT_FEEDER_SEED")
    monkeypatch.setenv("WEIGHT_FEEDER_STRATGEY", "ring")
    monkeypatch.setenv("WEIGHT_FEEDER_SERVICE_HOST", "10.0.0.1")  # as clusters set it
    assert parse("").strategy == "resident"
    said = capsys.readouterr().err
    assert said == (
        "warning: the variable WEIGHT_FEEDER_STRATGEY is not known and ignored:"
        " do you mean WEIGHT_FEEDER_STRATEGY?\n"
    )


def test_a_flag_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "", "--cash=3")
    assert "unrecognized arguments: --cash=3: do you mean --cache?" in said
    assert "do you mean" not in refused(capsys, "", "--wombat")
    assert "unrecognized arguments: --prom" in refused(capsys, "", "--prom", "x")  # in full only


def test_a_key_that_others_can_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own_file(tmp_path, 'api-key = "k"\n')
    path.chmod(0o644)
    assert parse("serve").api_key == "k"
    assert "others can read it: chmod 600" in capsys.readouterr().err
    path.chmod(0o600)
    assert parse("serve").api_key == "k"
    assert capsys.readouterr().err == ""


def test_every_command_may_have_a_table(tmp_path: Path) -> None:
    own_file(tmp_path, "".join(f"[{command}]\n" for command in COMMANDS))
    assert parse("").cache == "auto"


def test_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser("run", prog="x")
    try:
        parser.parse_args(["--log-format=json"])
        log.report_error("a line\nand another", 1)
    finally:
        log.choose_format("text")
    (line,) = capsys.readouterr().err.splitlines()
    said = json.loads(line)
    assert said["level"] == "error" and said["exit_code"] == 1
    assert said["message"] == "a line\nand another"


@pytest.mark.parametrize("format_", ["text", "json"])
def test_what_libraries_will_change_is_not_for_users(format_: str) -> None:
    """It would stand between the lines of a chat. Who develops asks Python for it."""
    script = (
        "import warnings; from common import log; "
        f"log.choose_format({format_!r}); log.setup('engine'); "
        "warnings.warn('renamed', FutureWarning); warnings.warn('real', UserWarning)"
    )
    for flags, shown in (([], False), (["-W", "default"], True)):
        command = [sys.executable, *flags, "-c", script]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert ("renamed" in said) is shown and "real" in said
