"""When drafting pays and when not follows from what came of it and what it took; not from a clock."""

from __future__ import annotations

from collections.abc import Callable

from common.config import Speculate
from tests.unit.test_pace import Machine, flat

DRAFT = Speculate.parse("draft")
PASS_S = 0.3


def endless(text: list[int]) -> int:
    """Nothing in it repeats itself, so that a lookup finds nothing."""
    return 1000 + len(text)


class Drafting(Machine):
    """A draft model that is right about ``right(place in the text)``, at ``each_s`` a token."""

    def __init__(
        self,
        right: Callable[[int], bool],
        each_s: float,
        cost: Callable[[int], float] = flat,
        asked: Speculate = DRAFT,
    ) -> None:
        super().__init__(asked, cost)
        self.right, self.each_s, self.drafted = right, each_s, 0
        self.draft = self._draft

    def _draft(self, count: int) -> list[int]:
        self.now += self.each_s * count
        self.drafted += count
        places = range(len(self.text), len(self.text) + count)
        return [1000 + place if self.right(place) else -1 for place in places]

    def seconds(self, tokens: int) -> float:
        before = self.now
        self.run([1], endless, tokens)
        return self.now - before


def always(place: int) -> bool:
    return True


def never(place: int) -> bool:
    return False


def test_a_good_draft_takes_few_passes() -> None:
    machine = Drafting(always, 0.01 * PASS_S)
    assert machine.seconds(640) < 0.15 * 640 * PASS_S
    figures = machine.speculation.figures()
    assert figures["tokens_per_pass"] > 10 and figures["acceptance"] == 1
    assert figures["drafted_passes"] == figures["wide_passes"] > 30
    assert abs(figures["drafting_s"] - machine.drafted * 0.01 * PASS_S) < 1e-3
    ones = figures["passes"] - figures["wide_passes"]
    passes_s = figures["passes"] * PASS_S + figures["drafting_s"]
    assert abs(figures["saved_s"] - (639 * PASS_S - passes_s)) < 1e-2 and ones < 15


def test_a_draft_that_is_always_wrong_costs_less_than_a_tenth() -> None:
    """Of the time that the text takes without it, whatever drafting costs, in short texts too."""
    for each_s in (0.001 * PASS_S, 0.02 * PASS_S, 0.2 * PASS_S, PASS_S):
        for tokens in (150, 600, 3000):
            machine = Drafting(never, each_s)
            assert machine.seconds(tokens) < 1.1 * tokens * PASS_S, (each_s, tokens)
            figures = machine.speculation.figures()
            assert figures["accepted"] == 0 and figures["drafted_passes"] < 0.1 * tokens
            assert figures["saved_s"] <= 0


def test_a_draft_that_is_as_slow_as_the_model_costs_less_than_a_tenth() -> None:
    machine = Drafting(always, PASS_S)
    assert machine.seconds(2000) < 1.1 * 2000 * PASS_S
    assert machine.speculation.figures()["speculation_resting"]
    assert not machine.speculation.resting  # lookup costs nothing, and has not lost


def test_wide_passes_that_cost_too_much_are_left_alone() -> None:
    machine = Drafting(always, 0.001, cost=lambda width: PASS_S * width)
    assert machine.seconds(2000) < 1.1 * 2000 * PASS_S
    figures = machine.speculation.figures()
    assert 0 < figures["drafted_passes"] < 0.05 * figures["passes"]


def test_a_draft_that_becomes_good_is_noticed() -> None:
    machine = Drafting(never, 0.01 * PASS_S)
    machine.run([1], endless, 400)
    machine.right = always
    machine.run([1], endless, 1500)
    assert machine.seconds(640) < 0.2 * 640 * PASS_S


def test_as_many_as_are_right_are_drafted() -> None:
    """Two in a row are right, then one is wrong: to draft many would be for nothing."""
    machine = Drafting(lambda place: place % 3 > 0, 0.1 * PASS_S)
    machine.run([1], endless, 300)
    before = machine.drafted
    machine.run([1], endless, 600)
    figures = machine.speculation.figures()
    assert machine.drafted - before < 4 * 200
    assert figures["tokens_per_pass"] > 1.8 and figures["saved_s"] > 0


def test_no_more_than_are_asked_for() -> None:
    machine = Drafting(always, 0.001, asked=Speculate.parse("draft:3"))
    machine.run([1], endless, 400)
    assert max(machine.widths) == 4 and machine.widths.count(4) > 80


def test_a_lookup_that_is_surer_goes_first() -> None:
    """A text that repeats itself needs no draft that takes time."""
    machine = Drafting(always, 0.1 * PASS_S)
    prompt = [place % 40 for place in range(90)]
    widths = machine.run(prompt, lambda text: len(text) % 40, 640)
    assert machine.speculation.figures()["drafted_passes"] < 5
    assert len(widths) < 60


def test_a_draft_that_has_nothing_to_give() -> None:
    machine = Drafting(always, 0.001)
    machine.draft = lambda count: []
    assert set(machine.run([1], endless, 200)) == {1}
    machine.draft = machine._draft  # its feeder is back
    assert len(machine.run([1], endless, 400)) < 60
