"""A conversation on a terminal, with the demo model, which knows sums and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from demo.sums import Sum
from tests.processes import Room, until
from tests.terminals import Terminal, terminal

ANSWER = Sum("1.1", "2.3").working
PROMPT = "> "


def say(it: Terminal, line: str) -> str:
    """What comes in reply to a line."""
    said = it.answer(line, PROMPT)
    return said.replace("\r\n", "\n").removesuffix(PROMPT)


def test_a_conversation(room: Room, demo_store: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    with terminal(room, "launch.py", "chat", f"--model={demo_store}", "--max-new-tokens=120") as it:
        it.read_until("Ctrl-D ends")
        it.read_until("> ")
        assert ANSWER in say(it, "1.1+2.3=?")
        assert "tok/s, TTFT" in say(it, "/stats")
        assert "/nonsense is no command: /help names them" in say(it, "/nonsense")
        it.type("\x1b[Aly\n")  # the arrow brings the last line back
        it.read_until("/nonsensely is no command: /help names them")
        it.read_until(PROMPT)
        assert "/reset" in say(it, "/help")
        say(it, f"/save {saved}")
        assert f"{saved} exists" in say(it, f"/save {saved}")
        said = [("user", "1.1+2.3=?"), ("assistant", ANSWER)]
        messages = json.loads(saved.read_text())["messages"]
        assert [(message["role"], message["content"]) for message in messages] == said
        # Every digit is a token, and the context has 512.
        assert "forgotten" not in say(it, "2" * 200)
        assert "the oldest 2 questions and answers are forgotten" in say(it, "3" * 200)
        say(it, "/reset")
        assert ANSWER in say(it, "1.1+2.3=?")  # as if it were the first
        say(it, "/system Answer.")
        it.type('"""one\n')
        it.read_until(". ")
        say(it, 'two"""')
        second = tmp_path / "second.json"
        say(it, f"/save {second}")
        messages = json.loads(second.read_text())["messages"]
        assert messages[0] == {"role": "system", "content": "Answer."}
        assert {"role": "user", "content": "one\ntwo"} in messages
        it.type("\x04")
        assert it.popen.wait() == 0


def test_an_interrupt_stops_the_answer_alone(room: Room, demo_store: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    with terminal(room, "launch.py", "chat", f"--model={demo_store}", "--max-new-tokens=120") as it:
        it.read_until("Ctrl-D ends")
        it.read_until("> ")
        it.type("1.1+2.3=?\n")
        it.read_until("001.1")
        it.type("\x03")
        it.read_until(PROMPT)
        it.type("to be thrown away")
        it.interrupt(PROMPT)
        say(it, f"/save {saved}")
        until(lambda: saved.exists() and saved.read_text().endswith("\n"), lambda: "it is saved")
        question, answer = json.loads(saved.read_text())["messages"]
        assert question["content"] == "1.1+2.3=?"
        assert ANSWER.startswith(answer["content"]) and answer["content"] != ANSWER
        it.type("/exit\n")
        assert it.popen.wait() == 0
    kept = room.path / "state" / "weight-feeder" / "chat_history"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert kept.read_text().splitlines()[-3:] == ["1.1+2.3=?", f"/save {saved}", "/exit"]
