"""How large the arena becomes: what was asked, what the plan needs, what is free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.config import Cache
from common.errors import MemoryShortageError, StrategyError
from common.plan import Capacity, Plan
from common.store import Store
from feeder.budget import Request, slot_formats, slot_sizes
from feeder.quantize import quantize_checkpoint
from feeder.strategies.base import Strategy
from feeder.strategies.on_demand import OnDemand
from feeder.strategies.registry import BUILT_IN, make_strategy
from feeder.strategies.ring import Ring
from tests.checkpoints import make_checkpoint
from tests.stores import LINEAR, write_store

PLENTY = 1 << 60
SIZES = [size * 512 for size in (40, 10, 10, 40, 200, 200, 200, 900)]  # the last is lm_head's
NAMES = [f"weight {i}" for i in range(8)]


def request(cache: str, sizes: list[int] = SIZES) -> Request:
    return Request(Plan(tuple(range(len(sizes)))), sizes, NAMES, Cache.parse(cache))


@pytest.mark.parametrize(
    ("count", "units"),
    # The most that so many neighbours need, across the end of the pass too; never N x the largest.
    [(1, 900), (2, 1100), (3, 1300), (4, 1500), (5, 1540), (6, 1580), (7, 1590), (8, 1600)],
)
def test_a_number_takes_what_so_many_neighbours_need(count: int, units: int) -> None:
    for strategy in (Ring(), OnDemand()):
        found = request(str(count)).capacity(strategy, PLENTY)
        assert found == (Capacity(count, units * 512), None)


@pytest.mark.parametrize("cache", ["-1", "8", "9", "128", "1TiB"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_all_is_all_and_no_more(cache: str, name: str) -> None:
    capacity, cut = request(cache).capacity(make_strategy(name), PLENTY)
    assert capacity == Capacity(8, sum(SIZES))
    assert cut is None


@pytest.mark.parametrize("name", BUILT_IN)
def test_bytes_are_taken_as_asked(name: str) -> None:
    asked = 900 * 512 + 77
    capacity, cut = request(f"{asked}B").capacity(make_strategy(name), PLENTY)
    assert capacity == Capacity(8, asked)
    assert cut is None


@pytest.mark.parametrize(("cache", "free"), [("-1", 1000), ("3", 901), ("1MB", 900), ("8", 1599)])
def test_a_cache_is_cut_to_what_is_free(cache: str, free: int) -> None:
    capacity, cut = request(cache).capacity(Ring(), free * 512)
    assert capacity.size_bytes == free * 512
    assert cut is not None and "\n" not in cut
    assert cut.startswith(f"cache {Cache.parse(cache)} would take ")
    assert cut.endswith(": cut to that")


@pytest.mark.parametrize("free", [900, 901, 1599, 1600, 1 << 40])
def test_auto_is_all_there_is_room_for_and_says_nothing(free: int) -> None:
    for name in BUILT_IN:
        found = request("auto").capacity(make_strategy(name), free * 512)
        assert found == (Capacity(8, min(free, 1600) * 512), None)


def test_who_has_too_little_is_said() -> None:
    _, cut = request("-1").capacity(Ring(), 1000 * 512, has="--vram gives", short="no room at all")
    assert cut == "cache -1 would take 819 kB; --vram gives 512 kB for slots: cut to that"
    with pytest.raises(MemoryShortageError, match="^no room at all$"):
        request("-1").capacity(Ring(), 899 * 512, has="--vram gives", short="no room at all")


def test_exactly_what_is_free_is_not_cut() -> None:
    assert request("1").capacity(Ring(), 900 * 512) == (Capacity(1, 900 * 512), None)


@pytest.mark.parametrize("free", [900 * 512 - 1, 1, 0, -5_000_000])
def test_where_nothing_fits_the_error_says_how_much_is_needed(free: int) -> None:
    for cache in ("1", "-1", "1GB"):
        with pytest.raises(MemoryShortageError) as caught:
            request(cache).capacity(Ring(), free)
        text = str(caught.value)
        assert "the largest weight, weight 7, needs 461 kB (460,800 bytes) in a slot" in text
        assert "free device memory" in text
        assert "-" not in text.partition(" of device")[0]  # nothing negative is shown


def test_a_size_that_holds_no_weight_is_refused_whatever_is_free() -> None:
    with pytest.raises(MemoryShortageError) as caught:
        request("460799B").capacity(Ring(), PLENTY)
    assert str(caught.value).startswith(
        "cache 460799B holds not even one weight: the largest weight,"
    )
    assert "460,800 bytes" in str(caught.value)
    assert request("460800B").capacity(Ring(), PLENTY)[0] == Capacity(8, 460800)


@given(
    sizes=st.lists(st.integers(1, 30).map(lambda units: units * 512), min_size=1, max_size=8),
    count=st.integers(1, 10),
    free=st.integers(-1, 300 * 512),
    name=st.sampled_from(sorted(BUILT_IN)),
)
def test_never_more_than_asked_or_free(sizes: list[int], count: int, free: int, name: str) -> None:
    asked = request(str(count), sizes)
    try:
        capacity, cut = asked.capacity(make_strategy(name), free)
    except MemoryShortageError:
        assert free < max(sizes)
        return
    biggest = sum(sorted(sizes)[-count:])
    assert max(sizes) <= capacity.size_bytes <= min(biggest, free)
    assert capacity.count == min(count, len(sizes))
    assert (cut is not None) == (capacity != asked.capacity(make_strategy(name), PLENTY)[0])


class Odd(Strategy):
    name = "odd"

    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer

    def arena_bytes(self, plan: Plan, sizes: object, count: int) -> int:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]


@pytest.mark.parametrize("answer", ["12", None, 1.5, True, [512], ValueError("no idea")])
def test_a_strategy_that_cannot_say_is_refused(answer: object) -> None:
    with pytest.raises(StrategyError, match=r"odd: arena_bytes (gives|raises)"):
        request("3").capacity(Odd(answer), PLENTY)


@pytest.mark.parametrize(
    ("answer", "units"), [(-1, 900), (0, 900), (1 << 70, 1600), (512 * 950, 950)]
)
def test_a_strategy_that_says_too_little_or_too_much(answer: int, units: int) -> None:
    assert request("3").capacity(Odd(answer), PLENTY)[0] == Capacity(3, units * 512)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_slots_are_as_large_as_their_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    store = Store.open(write_store(tmp_path / "store"))
    formats = ["packed" if weight % 3 else "dequantized" for weight in range(len(store.weights))]
    sizes = slot_sizes(store, dtype, formats)
    for entry, slot_format, size in zip(store.weights, formats, sizes, strict=True):
        rows, columns = LINEAR[entry.name]
        if slot_format == "packed":
            codes, blocks = -(-rows * columns // 2), -(-rows * columns // 128)
            needed = -(-codes // 256) * 256 + 2 * blocks
        else:
            needed = rows * columns * (4 if dtype == torch.float32 else 2)
        assert size % 512 == 0
        assert needed <= size < needed + 512


class Chooses(Strategy):
    """Wants some weights in a format of its own."""

    name = "chooses"

    def __init__(self, answers: dict[int, object]) -> None:
        super().__init__()
        self.answers = answers

    def slot_format(self, weight: int, usual: str) -> str:
        answer = self.answers.get(weight, usual)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[return-value]


@pytest.fixture(scope="module")
def packable_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two layers; all weights but down_proj, which has 208 columns, can be multiplied with packed."""
    path = tmp_path_factory.mktemp("packable")
    checkpoint = make_checkpoint(path / "model", hidden=64, intermediate=208)
    quantize_checkpoint(checkpoint, path / "store", "cpu", progress=False)
    return Store.open(path / "store")


def test_what_slots_hold(packable_store: Store) -> None:
    names = [entry.name for entry in packable_store.weights]
    total = len(names)
    best = ["dequantized" if name.endswith("down_proj") else "packed" for name in names]
    assert best.count("packed") == total - 2
    for slots in ("auto", "packed"):
        assert slot_formats(packable_store, slots, Ring()) == best
    assert slot_formats(packable_store, "dequantized", Ring()) == ["dequantized"] * total
    first, down = 0, next(i for i, name in enumerate(names) if name.endswith("down_proj"))
    mixed = Chooses({first: "dequantized", down: "packed"})
    expected = ["dequantized", *best[1:]]  # what cannot be packed is not
    assert slot_formats(packable_store, "auto", mixed) == expected
    only = slot_formats(packable_store, "dequantized", Chooses({first: "packed"}))
    assert only == ["packed"] + ["dequantized"] * (total - 1)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("int4", "gives 'int4', expected dequantized or packed"),
        (None, "gives None"),
        (ValueError("no idea"), "raises ValueError"),
    ],
)
def test_a_strategy_that_names_no_format_is_refused(
    packable_store: Store, answer: object, problem: str
) -> None:
    with pytest.raises(StrategyError, match=f"^chooses: slot_format {problem}"):
        slot_formats(packable_store, "auto", Chooses({3: answer}))
