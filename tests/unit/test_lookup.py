"""The index of a text finds what a search of the whole text finds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from bench.lookups import last_tokens, passes, whole_text
from engine.lookup import NOTED, Lookup


def searched(text: list[int]) -> tuple[int, int]:
    """The longest end of ``text`` that ends earlier in it too, and the newest place where it does."""
    for length in range(len(text) - 1, 0, -1):
        for place in range(len(text) - 1, length - 1, -1):
            if text[place - length : place] == text[-length:]:
                return length, place
    return 0, 0


def continued(text: list[int], place: int, count: int) -> list[int]:
    whole = list(text)
    for i in range(count):
        whole.append(whole[place + i])
    return whole[len(text) :]


# Few different tokens, so that nearly everything has been there before.
texts = st.integers(1, 5).flatmap(
    lambda tokens: st.lists(st.integers(0, tokens - 1), max_size=NOTED)
)


@settings(max_examples=300, deadline=None)
@given(texts)
def test_the_newest_place_of_the_longest_match_is_found(text: list[int]) -> None:
    lookup = Lookup()
    for end, token in enumerate(text, 1):
        lookup.add(token)
        match, place = searched(text[:end])
        assert lookup.match == match
        expected = continued(text[:end], place, 9) if match else []
        assert lookup.guess(9) == expected
        assert lookup.guess(2) == expected[:2]
    assert len(lookup) == len(text)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=6), st.integers(100, 160))
def test_a_long_text_that_repeats_itself(pattern: list[int], count: int) -> None:
    """Here there are more suffixes than are noted: the match is the longest all the same."""
    text = (pattern * count)[:count]
    lookup = Lookup(text)
    assert lookup.match == searched(text)[0]
    assert lookup.guess(20) == (pattern * (count + 20))[count : count + 20]


def test_the_whole_context_counts() -> None:
    """Not the last few tokens alone: of two places that agree on those, the longer match is taken."""
    shared = [7, 8, 9]
    text = [1, 2, *shared, 50, 4, *shared, 60, 1, 2, *shared]
    lookup = Lookup(text)
    assert lookup.match == 5
    assert lookup.guess(2) == [50, 4]
    lookup.add(60)  # it was the other one
    assert lookup.match == 4
    assert lookup.guess(3) == [1, 2, 7]


def test_nothing_is_guessed_where_nothing_was_before() -> None:
    assert Lookup().guess(3) == []
    assert Lookup([1, 2, 3]).guess(3) == []


def test_what_the_bench_counts() -> None:
    """Nothing is there before the repetition's first token; from then on a pass takes sixteen."""
    text = [*range(40), *range(40)]
    assert passes(text, 40, whole_text(text)) == passes(text, 40, last_tokens(text, 2)) == 4
    assert passes(text, 1, whole_text(text)) == 39 + 4
    misled = [1, 2, 3, 4, 50, 60, 9, 2, 3, 4, 70, 80, 1, 2, 3, 4, 50, 60]
    assert passes(misled, 16, whole_text(misled)) == 1  # what follows 1 2 3 4
    assert passes(misled, 16, last_tokens(misled, 2)) == 1  # the first place of 3 4: luck
    assert passes(misled[6:], 10, last_tokens(misled[6:], 2)) == 2
