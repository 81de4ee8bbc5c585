"""What is on the device beside the slots, for shapes whose figures are worked out by hand here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.families import expected_tensors
from common.footprint import (
    PASS_STEP,
    activation_bytes,
    kv_bytes,
    model_context,
    pass_tokens,
    prompt_bytes,
    split_bytes,
)
from common.shapes import SHAPES
from common.store import ResidentEntry, Store, WeightEntry
from feeder.footprint import (
    MARGIN_BYTES,
    DraftPart,
    Footprint,
    Limits,
    footprints,
    slot_room,
)

BIG = SHAPES["qwen2.5-32b"]
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
GB = 10**9


def store(config: dict[str, Any]) -> Store:
    """As much of a store as a plan looks at."""
    _, residents = expected_tensors(config)
    entries = tuple(ResidentEntry(n, s, "F32", 0, "", "") for n, s in residents.items())
    tied = config["tie_word_embeddings"]
    return Store(Path(), 1, "", None, "bfloat16", tied, config, (), entries)


def best(
    config: dict[str, Any],
    limits: Limits = Limits(),  # noqa: B008
    device: torch.device = CUDA,
    staging: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Footprint:
    return next(footprints(store(config), dtype, device, limits, staging, packed=False))


def test_the_32b_by_hand() -> None:
    found = best(BIG, staging=150_994_944)
    assert found.contexts == 2 * (640 << 20)
    assert found.staging == 150_994_944
    assert found.residents == 2_238_464  # 64 x (2 x 5120 + 5120 + 2 x 1024) + 5120, no embedding
    assert found.kv_cache == 1 << 30  # 256 KiB a token
    assert (found.tokens, found.pass_tokens) == (4096, 4096)
    mlp = 3 * 4096 * 27648 * 2
    assert mlp < found.activations < 1.3 * mlp
    assert (
        found.total
        == sum((found.contexts, found.staging, found.residents, found.kv_cache, found.activations))
        + (found.kv_cache + found.activations) // 8
    )


def test_the_embedding_is_counted_where_it_is() -> None:
    table = 152064 * 5120 * 2
    assert best(BIG, device=CPU).residents == best(BIG).residents + table
    tied = SHAPES["qwen2.5-0.5b"]
    assert best(tied).residents == best(tied, device=CPU).residents > 151936 * 896 * 2
    # In the model's dtype, whatever the store's files have.
    assert best(BIG, dtype=torch.float32).residents == 2 * best(BIG).residents


def test_packed_weights_need_scratch_for_many_tokens() -> None:
    linear, _ = expected_tensors(BIG)
    entries = tuple(WeightEntry(n, s, "", 0, 0, "", "") for n, s in linear.items())
    weights = replace(store(BIG), weights=entries)
    packed, dequantized = (
        next(footprints(weights, torch.bfloat16, CUDA, Limits(), 0, packed=on))
        for on in (True, False)
    )
    assert (packed.scratch, dequantized.scratch) == (283_115_520, 0)  # 27648 x 5120 x 2
    assert packed.total - dequantized.total == 283_115_520
    assert "scratch for packed weights 283 MB" in str(packed)
    assert "scratch" not in str(dequantized)
    small = replace(weights, weights=entries[:1])
    found = next(footprints(small, torch.bfloat16, CUDA, Limits(), 0, packed=True))
    assert found.scratch == 5120 * 5120 * 2


def test_the_cpu_has_no_context_to_pay_for() -> None:
    assert best(BIG, device=CPU).contexts == 0


@pytest.mark.parametrize(
    ("asked", "most", "tokens"),
    [(None, 32768, 4096), (None, 1000, 1000), (9000, 32768, 9000), (9000, 8192, 8192), (1, 9, 1)],
)
def test_the_context_that_memory_is_kept_for(asked: int | None, most: int, tokens: int) -> None:
    config = BIG | {"max_position_embeddings": most}
    found = best(config, Limits(context=asked))
    assert found.tokens == tokens
    assert found.kv_cache == tokens * (256 << 10)
    assert found.pass_tokens == min(tokens, 4096)


def test_a_config_that_names_no_context() -> None:
    config = {name: value for name, value in BIG.items() if name != "max_position_embeddings"}
    assert model_context(config) == 32768


def test_passes_become_shorter_down_to_a_step() -> None:
    found = [*footprints(store(BIG), torch.bfloat16, CUDA, Limits(), 0, False)]
    assert [f.pass_tokens for f in found] == [4096, 2048, 1024, 512, 256]
    assert len({f.kv_cache for f in found}) == 1
    totals = [f.total for f in found]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 5
    short = footprints(store(BIG), torch.bfloat16, CUDA, Limits(context=7), 0, False)
    assert [f.pass_tokens for f in short] == [7]


def test_what_is_known_of_a_prompt_takes_no_pass() -> None:
    """A turn of a long conversation: 60 tokens behind 7940."""
    whole, turn = (prompt_bytes(BIG, 8000, known, 2) for known in (0, 7940))
    assert whole == activation_bytes(BIG, 8000, 2)
    assert turn == split_bytes(BIG, 8000, 60, 2) < whole / 5
    room = kv_bytes(BIG, 8000, 2) + turn
    assert pass_tokens(BIG, 8000, 2, room, known=7940) == 60
    assert pass_tokens(BIG, 8000, 2, room) < 8000
    assert pass_tokens(BIG, 8000, 2, 0, known=7940) == 60  # less than a step is not split
    assert pass_tokens(BIG, 8000, 2, 0, known=4000) == PASS_STEP


sizes = st.integers(1, 100 * GB)


@given(vram=sizes, free=sizes, context=st.integers(1, 40000), given_up=st.integers(0, 10 * GB),
       staging=st.integers(0, GB), runs=st.booleans())  # fmt: skip
def test_the_parts_and_the_slots_are_never_more_than_vram(
    vram: int, free: int, context: int, given_up: int, staging: int, runs: bool
) -> None:
    limits = Limits(vram, context)
    for footprint in footprints(store(BIG), torch.bfloat16, CUDA, limits, staging, False):
        room = slot_room(footprint, limits, free, runs, given_up).size_bytes
        assert room + footprint.total + given_up <= vram
        assert room <= free - MARGIN_BYTES
        # As much as both bounds allow, and the device's alone without --vram.
        alone = slot_room(footprint, Limits(context=context), free, runs).size_bytes
        assert room == min(alone, vram - footprint.total - given_up)
        coming = 0 if runs else footprint.total - footprint.staging - footprint.contexts // 2
        assert alone + coming + MARGIN_BYTES == free


@given(low=st.integers(0, 40000), more=st.integers(1, 40000), name=st.sampled_from(sorted(SHAPES)))
def test_more_tokens_take_more(low: int, more: int, name: str) -> None:
    config = SHAPES[name]
    assert kv_bytes(config, low, 2) < kv_bytes(config, low + more, 2)
    assert activation_bytes(config, low, 2) < activation_bytes(config, low + more, 2)
    assert kv_bytes(config, more, 4) == 2 * kv_bytes(config, more, 2)


@given(tokens=st.integers(1, 40000), room=st.integers(-GB, 20 * GB))
def test_a_pass_takes_what_there_is_room_for(tokens: int, room: int) -> None:
    found = pass_tokens(BIG, tokens, 2, room)
    assert 1 <= found <= tokens
    room -= kv_bytes(BIG, tokens, 2)
    if found == tokens:
        assert activation_bytes(BIG, tokens, 2) <= room or tokens <= PASS_STEP
    else:
        assert activation_bytes(BIG, tokens, 2) > room  # not without need
        assert found % PASS_STEP == 0
        assert split_bytes(BIG, tokens, found, 2) <= room or found == PASS_STEP
        assert split_bytes(BIG, tokens, found + PASS_STEP, 2) > room


def test_a_part_of_a_prompt_by_hand() -> None:
    masked = 1024 * 8192 * 3  # a byte, and two of bfloat16
    heads = 2 * 8192 * 5120 * 2  # keys and values for each of 40 heads
    assert split_bytes(BIG, 8192, 1024, 2) == activation_bytes(BIG, 1024, 2) + masked + heads


def test_a_window_takes_a_mask_where_a_prompt_reaches_beyond_it() -> None:
    plain = SHAPES["mistral-7b"]
    windowed = plain | {"sliding_window": 4096}
    masked = (
        4096 * 4096 * 3 + 2 * 4096 * 4096 * 2
    )  # and keys and values for each of 32 heads of 128
    assert activation_bytes(windowed, 4095, 2) == activation_bytes(plain, 4095, 2)
    assert activation_bytes(windowed, 4096, 2) == activation_bytes(plain, 4096, 2) + masked
    assert split_bytes(windowed, 8192, 1024, 2) == split_bytes(plain, 8192, 1024, 2)


def test_heads_that_are_not_hidden_over_heads() -> None:
    config = SHAPES["qwen3-32b"]  # 64 heads of 128, while hidden_size is 5120
    assert kv_bytes(config, 1, 2) == 2 * 64 * 8 * 128 * 2
    wide = config | {"intermediate_size": 64}
    assert activation_bytes(wide, 1000, 2) - activation_bytes(wide, 0, 2) == 1000 * (
        (6 * 64 * 128 + 8 * 8 * 128) * 2 + 2 * 5120 * 2
    )


def test_a_shortage_is_one_line_that_adds_up() -> None:
    footprint = best(BIG, staging=160_000_000)
    head = 152064 * 5120 * 2
    limits = Limits(vram_bytes=3 * GB)
    text = slot_room(footprint, limits, 80 * GB, False).shortage(head, "lm_head")
    need = footprint.total + head
    assert text.startswith(f"--vram gives 3 GB and a run needs at least 5.21 GB ({need:,} bytes): ")
    for part in ("contexts 1.34 GB", "staging 160 MB", "embedding, norms and biases 2.24 MB",
                 "KV cache of 4,096 tokens 1.07 GB", "activations of 4,096 tokens 835 MB",
                 "a slot for lm_head 1.56 GB"):  # fmt: skip
        assert part in text, text
    assert "\n" not in text and "margin" not in text
    # What is needed is enough.
    assert slot_room(footprint, Limits(need), 80 * GB, False).size_bytes == head

    free = 2 * GB
    room = slot_room(footprint, Limits(), free, False)
    text = room.shortage(head, "lm_head")
    missing = head - room.size_bytes
    need += MARGIN_BYTES
    assert f"needs at least {need / GB:.3g} GB ({need:,} bytes)" in text and "margin 268 MB" in text
    # It says how much the device has to everything together: with what is missing, it is enough.
    assert text.startswith(f"the device has {(need - missing) / GB:.3g} GB and a run needs")
    assert slot_room(footprint, Limits(), free + missing, False).size_bytes == head


def test_a_draft_model_is_counted_with_the_rest() -> None:
    """A tied 1.5B beside the 32B: slots, KV cache and residents come on top, activations do not."""
    small, slots = SHAPES["qwen2.5-1.5b"], 677_000_000
    part = DraftPart(store(small), slots, packed=True)
    limits = Limits(vram_bytes=8 * GB)
    common = (store(BIG), torch.bfloat16, CUDA, limits, 0, True)
    alone, both = next(footprints(*common)), next(footprints(*common, part))
    assert both.draft_slots == slots and alone.draft_slots == alone.draft_engine == 0
    kv_cache = 28 * 1024 * 4096  # 28 layers, 2 x 256 values of 2 bytes
    residents = 2 * (151936 * 1536 + 28 * (2 * 1536 + 1536 + 2 * 256) + 1536)
    assert both.draft_engine == kv_cache + residents
    assert both.activations == alone.activations
    assert both.engine_bytes - alone.engine_bytes == both.draft_engine + kv_cache // 8
    more = both.total - alone.total
    assert more == slots + both.engine_bytes - alone.engine_bytes
    rooms = [slot_room(found, limits, 80 * GB, engine_runs=False) for found in (alone, both)]
    assert rooms[0].size_bytes - rooms[1].size_bytes == more  # of --vram
    free = [slot_room(found, Limits(), 20 * GB, False) for found in (alone, both)]
    assert free[0].size_bytes - free[1].size_bytes == more - slots  # which are taken already
    assert "the draft model's slots 677 MB" in str(both) and "draft" not in str(alone)
