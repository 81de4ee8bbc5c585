"""What users write for sizes and caches, and what is printed back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import Cache, format_bytes, parse_size
from common.errors import EXIT_USAGE, UsageError

UNITS = {"B": 1, "kB": 1000, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}  # fmt: skip


@given(number=st.integers(1, 10**6), unit=st.sampled_from(sorted(UNITS)), space=st.booleans())
def test_whole_sizes(number: int, unit: str, space: bool) -> None:
    for spelt in (unit, unit.lower(), unit.upper()):
        assert parse_size(f"{number}{' ' * space}{spelt}") == number * UNITS[unit]


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1.5GiB", 3 << 29),
        (" 500 MB ", 500_000_000),
        ("0.5B", None),
        ("1.9B", 1),
        ("0.001kB", 1),
        ("16.5GB", 16_500_000_000),
        ("9007199254740993B", 9007199254740993),  # a double would make it ...992
        ("0.3TB", 300_000_000_000),
        ("1.000000000000001TB", 1_000_000_000_000),
        ("9223372036854775807B", (1 << 63) - 1),
    ],
)
def test_sizes_are_exact_and_rounded_down(text: str, size_bytes: int | None) -> None:
    if size_bytes is None:
        with pytest.raises(UsageError, match="give at least one byte"):
            parse_size(text)
    else:
        assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["9223372036854775808B", "8388608TiB", "999999999999999999TB"])
def test_sizes_that_no_message_can_carry_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is beyond 64 bits: give at most 8388607TiB"):
        parse_size(text)
    with pytest.raises(UsageError, match="is not understood: give a number of weights"):
        Cache.parse(text)


BAD_SIZES = [
    "", " ", "GiB", "10", "10 G", "ten GB", "-1GB", "+1GB", "1e3MB", "1,5GB", ".5GB", "1.GB",
    "1GBs", "1 GiB GiB", "1GB\n2", "inf GB", "nanB", "0x10B", "1" * 400 + "B", "1." + "1" * 400 + "B",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_SIZES)
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not understood: write a number and a unit, as 10GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "cache", "printed"),
    [
        ("auto", Cache(auto=True), "auto"),
        (" Auto ", Cache(auto=True), "auto"),
        ("1", Cache(count=1), "1"),
        ("128", Cache(count=128), "128"),
        (" 7 ", Cache(count=7), "7"),
        ("+16", Cache(count=16), "16"),
        ("-1", Cache(), "-1"),
        ("10GiB", Cache(size_bytes=10 << 30), "10GiB"),
        ("1B", Cache(size_bytes=1), "1B"),
        ("2.5 kB", Cache(size_bytes=2500), "2500B"),
        ("1000000000GB", Cache(size_bytes=10**18), "1000000TB"),
        ("999999999999", Cache(count=999999999999), "999999999999"),
    ],
)
def test_caches(text: str, cache: Cache, printed: str) -> None:
    assert Cache.parse(text) == cache
    assert str(cache) == printed
    assert Cache.parse(printed) == cache  # as the launcher hands it on


@pytest.mark.parametrize("text", ["0", "-0", "-2", "-128", "+0", "00"])
def test_a_cache_holds_a_weight(text: str) -> None:
    with pytest.raises(
        UsageError, match=f"cache '.{text[1:]}' holds no weight: give a number from 1"
    ):
        Cache.parse(text)


@pytest.mark.parametrize(
    "text",
    ["", "all", "1.5", "--1", "1 2", "0B", "0GiB", "9" * 5000, *BAD_SIZES[1:3], *BAD_SIZES[4:]],
)
def test_bad_caches_are_refused(text: str) -> None:
    with pytest.raises(
        UsageError, match="is not understood: give a number of weights, -1 for all,"
    ):
        Cache.parse(text)


@given(st.text(max_size=20) | st.from_regex(r"[+-]?\d+(\.\d+)? ?[kKmMgG]?i?[bB]?", fullmatch=True))
def test_any_text_is_a_cache_or_refused(text: str) -> None:
    try:
        cache = Cache.parse(text)
    except UsageError as error:
        assert error.exit_code == EXIT_USAGE
        return
    assert (cache.count or 1) >= 1 and (cache.size_bytes or 1) >= 1
    assert Cache.parse(str(cache)) == cache


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1536, "1.54 kB"), (16_512_000_000, "16.5 GB"),
        (10**6, "1 MB"), (999_400_000, "999 MB"), (65 * 10**12, "65 TB"), (123.4, "123 B"),
    ],
)  # fmt: skip
def test_bytes_for_people(size_bytes: float, text: str) -> None:
    assert format_bytes(size_bytes) == text
