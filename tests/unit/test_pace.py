"""How many candidates are checked follows from what came of them and what passes took; not from a clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from common.config import MOST_CANDIDATES, Speculate
from common.errors import UsageError
from engine.lookup import Lookup
from engine.pace import LONGEST_REST
from engine.packed import MAX_FUSED_TOKENS
from engine.speculation import Drafting, Speculation

LOOKUP = Speculate.parse("lookup")


class Machine:
    """Runs texts through a Speculation, at so many seconds a pass of so many tokens."""

    def __init__(
        self,
        asked: Speculate,
        cost: Callable[[int], float],
        streams: bool = True,
        rounds: bool = False,
    ) -> None:
        self.now, self.cost, self.streams = 0.0, cost, streams
        self.repeatable = True
        self.speculation = Speculation(asked, lambda: self.streams, lambda: self.now, rounds)
        self.widths: list[int] = []
        self.draft: Drafting | None = None

    def run(
        self, prompt: list[int], following: Callable[[list[int]], int], tokens: int
    ) -> list[int]:
        """The widths of the passes in which ``tokens`` came about."""
        self.text = text = list(prompt)
        first = len(self.widths)
        self.speculation.begin(text, self.repeatable)
        text.append(following(text))
        self.speculation.add(text[-1])
        while (left := len(prompt) + tokens - len(text)) > 0:
            candidates = self.speculation.propose(left - 1, self.draft)
            assert len(candidates) <= left - 1
            self.widths.append(1 + len(candidates))
            self.now += self.cost(1 + len(candidates))
            for candidate in [*candidates, None]:
                text.append(following(text))
                self.speculation.add(text[-1])
                if text[-1] != candidate:
                    break
        self.speculation.end()
        return self.widths[first:]


def flat(width: int) -> float:
    return 0.3


def steep(width: int) -> float:
    return 0.3 * width


def in_turn(text: list[int]) -> int:
    """Repeats itself after 40 tokens."""
    return len(text) % 40


def contrary(text: list[int]) -> int:
    """Never what the lookup would guess."""
    guess = Lookup(text).guess(1)
    return (guess[0] + 1) % 5 if guess else 0


def test_a_text_that_repeats_itself_takes_few_passes() -> None:
    machine = Machine(LOOKUP, flat)
    widths = machine.run([in_turn([0] * i) for i in range(90)], in_turn, 320)
    assert len(widths) <= 25  # 20 would do
    figures = machine.speculation.figures()
    assert figures["passes"] == len(widths) and figures["tokens_per_pass"] > 12
    assert figures["candidates"] == sum(widths) - len(widths)
    assert figures["accepted"] == 319 - len(widths)  # each pass adds a token of its own
    assert figures["acceptance"] == 1


def test_guesses_that_are_always_wrong_are_soon_not_checked() -> None:
    """Each pass gives a token, right or wrong: what it costs are the passes that were wider."""
    machine = Machine(LOOKUP, flat)
    widths = machine.run([0, 1, 2, 3, 4] * 3, contrary, 600)
    assert len(widths) == 599
    assert 0 < sum(width > 1 for width in widths) < 0.05 * len(widths)
    figures = machine.speculation.figures()
    assert figures["accepted"] == 0 and figures["tokens_per_pass"] == 1
    assert figures["saved_s"] == 0  # they cost nothing here


def test_after_bad_guesses_good_ones_are_noticed() -> None:
    machine = Machine(LOOKUP, flat)
    machine.run([0, 1, 2, 3, 4] * 3, contrary, 600)
    widths = machine.run([in_turn([0] * i) for i in range(90)], in_turn, 320)
    assert len(widths) <= 40


def test_where_wide_passes_cost_too_much_it_rests_and_tries_again() -> None:
    machine = Machine(LOOKUP, steep)
    prompt = [in_turn([0] * i) for i in range(90)]
    widths = machine.run(prompt, in_turn, 3000)
    assert 0 < sum(width > 1 for width in widths) < 0.02 * len(widths)
    assert any(width > 1 for width in widths[200:])  # but rarely
    assert machine.speculation.resting and machine.speculation.figures()["speculation_resting"]
    machine.cost = flat
    machine.run(prompt, in_turn, 2 * LONGEST_REST)
    assert not machine.speculation.resting
    assert len(machine.run(prompt, in_turn, 320)) <= 25


def test_it_settles_for_what_pays() -> None:
    """Up to four tokens a pass costs as much as one; eight cost ten times as much."""
    machine = Machine(LOOKUP, lambda width: 0.3 if width <= 4 else 3.0)
    widths = machine.run([in_turn([0] * i) for i in range(90)], in_turn, 1000)
    assert sum(width == 4 for width in widths) > 0.85 * len(widths)
    assert machine.speculation.figures()["saved_s"] > 0.5 * 1000 * 0.3


def test_the_time_saved_is_that_of_the_passes_less() -> None:
    machine = Machine(Speculate.parse("lookup:3"), lambda width: 0.3 if width == 1 else 0.4)
    prompt = list(range(40)) * 2
    widths = machine.run(
        prompt, lambda text: in_turn(text) if len(text) > 90 else 50 + len(text), 320
    )
    wide = sum(width > 1 for width in widths)
    narrow = len(widths) - wide
    assert wide > 50 and narrow > 10 and max(widths) == 4
    expected = 0.3 * (319 - narrow) - 0.4 * wide
    assert machine.speculation.figures()["saved_s"] == pytest.approx(expected, abs=1e-3)


def test_auto_proposes_only_while_weights_are_streamed() -> None:
    prompt = [in_turn([0] * i) for i in range(90)]
    machine = Machine(Speculate(), flat, streams=False)
    assert machine.speculation.resting
    assert set(machine.run(prompt, in_turn, 200)) == {1}
    machine.streams = True
    assert not machine.speculation.resting
    assert len(machine.run(prompt, in_turn, 320)) <= 25
    asked = Machine(LOOKUP, flat, streams=False)
    assert len(asked.run(prompt, in_turn, 320)) <= 25


def test_auto_leaves_texts_alone_that_rounding_could_change() -> None:
    """Those that can be had again. Of what is drawn anew each time nobody knows what it would have been."""
    prompt = [in_turn([0] * i) for i in range(90)]
    machine = Machine(Speculate(), flat, rounds=True)
    assert set(machine.run(prompt, in_turn, 200)) == {1}
    assert "--speculate lookup" in machine.speculation.figures()["speculation_off"]
    machine.repeatable = False
    assert len(machine.run(prompt, in_turn, 320)) <= 25
    assert machine.speculation.figures()["speculation_off"] == ""
    machine.streams = False
    assert set(machine.run(prompt, in_turn, 200)) == {1}
    asked = Machine(LOOKUP, flat, rounds=True)
    assert len(asked.run(prompt, in_turn, 320)) <= 25


def test_as_many_candidates_as_are_asked_for() -> None:
    machine = Machine(Speculate.parse("lookup:3"), flat)
    widths = machine.run([in_turn([0] * i) for i in range(90)], in_turn, 320)
    assert max(widths) == 4 and widths.count(4) > 70


def test_a_pass_is_no_wider_than_the_kernels() -> None:
    assert MOST_CANDIDATES + 1 == MAX_FUSED_TOKENS


@pytest.mark.parametrize(
    ("text", "mode", "most"),
    [
        ("auto", "auto", 15),
        ("off", "off", 15),
        ("lookup", "lookup", 15),
        ("Lookup:4", "lookup", 4),
        ("draft", "draft", 15),
        ("draft:3", "draft", 3),
    ],
)
def test_the_flag(text: str, mode: str, most: int) -> None:
    found = Speculate.parse(text)
    assert (found.mode, found.most) == (mode, most)
    assert Speculate.parse(str(found)) == found


def test_a_draft_models_directory_in_the_flag(tmp_path: Path) -> None:
    for name in ("small", "7", "odd:4"):
        (tmp_path / name).mkdir()
        path = tmp_path / name
        assert Speculate.parse(str(path)) == Speculate("draft", 15, path)
        found = Speculate.parse(f"{path}:4")
        assert (found.draft, found.most, str(found)) == (path, 4, "draft:4")
    with pytest.raises(UsageError, match="from 1 to 15"):
        Speculate.parse(f"{tmp_path}:99")


@pytest.mark.parametrize(
    "text", ["", "on", "lookup:", "lookup:0", "lookup:16", "auto:3", "off:1", "7", "/no:3"]
)
def test_mistakes_in_the_flag(text: str) -> None:
    with pytest.raises(UsageError, match="speculate"):
        Speculate.parse(text)
