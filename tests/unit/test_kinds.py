"""What `bench.kinds` asks, and what it makes of the summaries of its runs."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from bench.exercises import copying, exercises, listing
from bench.kinds import figures, main

TEXT = "the quick brown fox jumps over a lazy dog while seven other animals look on in silence"
WORDS = TEXT.split()


def test_exercises_are_answered_by_their_prompts() -> None:
    rng = random.Random(5)
    for _ in range(50):
        prompt, answer = copying(rng, WORDS)
        assert prompt == f"Text:\n{answer}Copy:\n" and answer.strip() in TEXT
        prompt, answer = listing(rng, WORDS)
        listed = prompt.removeprefix("Words: ").removesuffix("\nList:\n").split(", ")
        assert re.findall(r'^(\d+)\. the word "(\w+)"', answer, re.M) == [
            (str(number), word) for number, word in enumerate(listed, 1)
        ]
        assert len(set(listed)) == len(listed) and set(listed) <= set(WORDS)


def test_the_same_exercises_come_again() -> None:
    found = exercises([TEXT], 40, seed=3)
    assert found == exercises([TEXT], 40, seed=3)
    assert found != exercises([TEXT], 40, seed=4) and len(found) == 40
    assert {text.partition(":")[0] for text in found} == {"Text", "Words"}


def summary(tok_per_s: float, outputs: list[str], **more: Any) -> dict[str, Any]:
    answers = [{"output": text} for text in outputs]
    return {"prompts": 2, "tokens": 42, "tok_per_s": tok_per_s, "answers": answers, **more}


def test_figures_of_a_mode() -> None:
    off = [summary(10.0, ["a", "b"]), summary(5.0, ["a", "b"]), summary(8.0, ["a", "b"])]
    checked = {"passes": 20, "candidates": 50, "accepted": 20, "drafted_passes": 5}
    drafted = [
        summary(30.0, ["a", "b"], **checked),
        summary(10.0, ["a", "b"], **checked),
        summary(8.0, ["a", "c"], **checked | {"passes": 40}),
    ]
    plain, found = figures(off, off), figures(drafted, off)
    assert (plain["tokens_per_pass"], plain["acceptance"], plain["ratio"]) == (1.0, None, 1.0)
    assert plain["same_text"] and not found["same_text"]
    assert figures(drafted[:2], off[:2])["same_text"]
    assert found["tokens_per_pass"] == 1.5  # 120 tokens after the first ones, 80 passes
    assert found["acceptance"] == 0.4 and found["drafted_share"] == round(15 / 80, 4)
    assert found["ratio"] == 2.0 and found["tok_per_s"] == [30.0, 10.0, 8.0]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--kinds=verse"], "kind 'verse' is not known: name some of arithmetic, copying"),
        (["--kinds=copying"], "kind copying: give --model and --draft"),
        (["--model=demo/model"], "--model and --draft: give both"),
        (["--rounds=0"], "--rounds 0: expected at least 1"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    said = capfd.readouterr().err
    assert line in said and said.count("\n") == 1
