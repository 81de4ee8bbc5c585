"""A conversation on a terminal, with the demo model, which knows sums and nothing else."""

from __future__ import annotations

import json
import re
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from demo.sums import Sum
from tests.processes import DEMO, Room, until
from tests.reference import reference_model
from tests.terminals import Terminal, terminal

ANSWER = Sum("1.1", "2.3").working
PROMPT = "> "


def say(it: Terminal, line: str) -> str:
    """What comes in reply to a line."""
    said = it.answer(line, PROMPT)
    return said.replace("\r\n", "\n").removesuffix(PROMPT)


@cache
def demo() -> tuple[Any, Any]:
    """Tokenizer and plain model."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
    return tokenizer, reference_model(DEMO, torch.float32)


def prompt_of(messages: list[dict[str, str]]) -> list[int]:
    tokenizer, _ = demo()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def fresh_answer(prompt: list[int], tokens: int) -> list[int]:
    """What the plain model says to all of it at once."""
    return list(_fresh_answer(tuple(prompt), tokens))


@cache
def _fresh_answer(prompt: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    asked = {"max_new_tokens": tokens, "do_sample": False}
    return tuple(demo()[1].generate(torch.tensor([prompt]), **asked)[0, len(prompt) :].tolist())


def common(first: list[int], second: list[int]) -> int:
    """How many tokens they begin with alike."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def figures(it: Terminal) -> tuple[int, int]:
    """How many tokens the last prompt had, and how many of them were kept."""
    found = re.search(r"prompt of (\d+) tokens, (\d+) of them kept", say(it, "/stats"))
    assert found is not None
    return int(found[1]), int(found[2])


@pytest.mark.usefixtures("one_thread")
def test_turns_compute_only_what_is_new(room: Room, demo_store: Path) -> None:
    """And say what a conversation says that is told from its beginning."""
    tokens = 20  # so that answers are cut off, and the model goes on in the middle of its working
    flags = (f"--model={demo_store}", f"--max-new-tokens={tokens}", "--speculate=lookup")
    messages: list[dict[str, str]] = []
    in_cache: list[int] = []
    lines = ["1.1+2.3=?", "again", "/system Be brief.", "why", "/reset", "12.5+7.25=?"]
    with terminal(room, "launch.py", "chat", *flags) as it:
        it.read_until("Ctrl-D ends")
        it.read_until("> ")
        for line in lines:
            said = say(it, line)
            if line == "/reset":
                messages = messages[:1]
            if line.startswith("/system "):
                messages.insert(0, {"role": "system", "content": line.removeprefix("/system ")})
            if line.startswith("/"):
                continue
            messages.append({"role": "user", "content": line})
            prompt = prompt_of(messages)
            answer = fresh_answer(prompt, tokens)
            text = demo()[0].decode(answer, skip_special_tokens=True)
            assert said == text + "\n"
            messages.append({"role": "assistant", "content": text})
            assert figures(it) == (len(prompt), common(in_cache, prompt))
            in_cache = prompt + answer[:-1]  # the last was chosen, and no pass was made over it
        assert "; so far, lookup" in say(it, "/stats")
        it.type("/exit\n")
        assert it.popen.wait() == 0


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


@pytest.mark.usefixtures("one_thread")
def test_an_interrupt_stops_the_answer_alone(room: Room, demo_store: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    flags = (f"--model={demo_store}", "--max-new-tokens=120", "--speculate=off")
    with terminal(room, "launch.py", "chat", *flags) as it:
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
        prompt = prompt_of([question, answer, {"role": "user", "content": "again"}])
        text = demo()[0].decode(fresh_answer(prompt, 30), skip_special_tokens=True)
        assert say(it, "again").startswith(text)  # with what was kept of the one that was stopped
        total, kept = figures(it)
        assert total == len(prompt) and kept > len(prompt_of([question]))
        it.type("/exit\n")
        assert it.popen.wait() == 0
    lines = room.path / "state" / "weight-feeder" / "chat_history"
    assert lines.stat().st_mode & 0o777 == 0o600
    assert lines.read_text().splitlines()[-3:] == ["again", "/stats", "/exit"]
