"""Every command: its help, its place in docs/cli.md, its completion."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from manual.commands import Command, commands
from manual.completion import SHELLS, script
from manual.page import page

ROOT = Path(__file__).resolve().parents[2]
SCREEN = 46  # lines, of 80 columns
COMMANDS = list(commands())


def test_the_manual_is_up_to_date() -> None:
    found = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert found == page(), "run: python -m manual"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.title)
def test_help(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    short, whole = (command.parser.format_help(everything) for everything in (False, True))
    lines = short.splitlines()
    assert len(lines) <= SCREEN, "more flags for common.arguments.RARE, or less for SHORT to say"
    assert "examples:" in lines and "--help-all" in short
    assert all(action.help for action in command.parser._actions)
    for action in command.parser._actions:
        for flag in action.option_strings:
            assert flag in whole


@pytest.mark.parametrize("shell", SHELLS)
def test_completion(shell: str, tmp_path: Path) -> None:
    text = script(shell)
    for word in ("serve", "quantize", "log-format", "api-key", "dequantized"):
        assert word in text, word
    if shutil.which(shell) is None:
        return
    path = tmp_path / "script"
    path.write_text(text)
    assert subprocess.run([shell, "-n", path], check=False, capture_output=True).stderr == b""


def test_bash_completes(tmp_path: Path) -> None:
    """What a person who presses TAB gets."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    (tmp_path / "script").write_text(script("bash"))
    (tmp_path / "model").mkdir()
    tab = (
        ". ./script; COMP_WORDS=(weight-feeder serve --slots pa); COMP_CWORD=3;"
        " _shtab_weight_feeder weight-feeder pa --slots; echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(
        [bash, "-c", tab], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "packed\n"


def test_it_comes_without_torch() -> None:
    code = "import sys, manual.page; manual.page.page(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "feeder.quantize" in loaded and not loaded & {"torch", "transformers", "triton"}
