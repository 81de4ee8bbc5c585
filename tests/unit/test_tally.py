"""What a summary says of candidates: sums of all passes, an honest estimate, a word where there were none."""

from __future__ import annotations

from typing import Any

import pytest

from common.config import Speculate
from engine.report import candidates_said
from engine.speculation import Speculation
from engine.tally import NEWEST, Pass, Tally


def one(seconds: float) -> Pass:
    return Pass(0, 0, 1, seconds, False, 0.0)


def tallied(*passes: Pass) -> dict[str, Any]:
    tally = Tally()
    for done in passes:
        tally.add(done)
    return tally.figures()


def test_the_first_pass_is_no_measure() -> None:
    """Kernels may have been compiled in it."""
    wide = Pass(7, 5, 6, 0.5, True, 0.1)
    found = tallied(one(60.0), one(0.3), wide, one(0.3), wide)
    assert found["saved_s"] == pytest.approx(2 * (6 * 0.3 - 0.5 - 0.1))
    assert found["passes"] == 5 and found["tokens_per_pass"] == 3.0
    assert (found["candidates"], found["accepted"], found["drafted_passes"]) == (14, 10, 2)
    assert found["ms_per_token_median"] == 100  # of a token in a wide pass: there are more of those
    assert tallied(one(60.0), wide)["saved_s"] == 0  # nothing to compare with
    assert tallied()["tokens_per_pass"] == 0


def test_it_takes_no_more_room_the_longer_an_engine_runs() -> None:
    """Sums are over all, medians over the newest."""
    tally, wide = Tally(), Pass(3, 3, 4, 0.5, False, 0.0)
    for _ in range(NEWEST):
        tally.add(one(9.0))
    for _ in range(2 * NEWEST):
        tally.add(one(0.4))
        tally.add(wide)
    found = tally.figures()
    assert found["passes"] == 5 * NEWEST and found["accepted"] == 6 * NEWEST
    assert found["saved_s"] == pytest.approx(2 * NEWEST * (4 * 0.4 - 0.5))
    assert found["ms_per_token_median"] == 125
    kept = sum(len(value) for value in vars(tally).values() if hasattr(value, "__len__"))
    assert kept == 2 * NEWEST


@pytest.mark.parametrize(
    ("asked", "streams", "stepped", "said"),
    [
        ("auto", False, False, "lookup is off: all weights stay"),
        ("auto", True, True, ""),
        ("lookup:3", False, False, "lookup: no candidates were checked"),
        ("lookup:3", False, True, "lookup is off: all weights stay"),
        ("draft", False, True, "draft is off: all weights stay"),
        ("draft", True, True, "draft: no candidates were checked"),
    ],
)
def test_where_nothing_was_checked(asked: str, streams: bool, stepped: bool, said: str) -> None:
    speculation = Speculation(
        Speculate.parse(asked), lambda: streams, most=lambda: 8 if stepped else 1
    )
    figures = speculation.figures()
    assert candidates_said(figures) == said
    assert bool(figures["speculation_off"]) == ("off" in said)
    assert candidates_said({"speculate": "off"}) == ""


def test_a_draft_that_was_never_asked() -> None:
    found = tallied(one(1.0), one(0.1), Pass(9, 9, 10, 0.1, False, 0.0))
    said = candidates_said({"speculate": "draft", "speculation_resting": True, **found})
    assert said.startswith("lookup, and the draft does not pay here and rests: ")
    assert "drafting" not in said


def test_where_it_loses_it_says_so() -> None:
    lost = tallied(one(1.0), one(0.1), Pass(4, 0, 1, 0.2, True, 0.3))
    said = candidates_said({"speculate": "draft:4", "speculation_resting": True, **lost})
    assert said == (
        "draft, which does not pay here and rests: 1.00 tokens a pass, 0 % of 4 candidates accepted,"
        " 0.30 s drafting, about 0.40 s lost"
    )
    both = tallied(
        one(1.0), one(0.1), Pass(4, 0, 1, 0.2, True, 0.3), Pass(9, 9, 10, 0.1, False, 0.0)
    )
    said = candidates_said({"speculate": "draft", "speculation_resting": True, **both})
    assert said == (
        "draft and lookup, and the draft does not pay here and rests: 3.25 tokens a pass, 69 % of 13"
        " candidates accepted, 0.30 s drafting, about 0.50 s saved"
    )
