"""--vram, --context and --cache auto in real processes: slots get what is left, and no more."""

from __future__ import annotations

import math
from pathlib import Path

from common.store import Store
from tests import lives
from tests.processes import Room, assert_refused

CPU = ("--device=cpu", "--dtype=float32", "--slots=dequantized")
LITTLE = ("--vram=70MB", "--context=900")


def whole(store: Path) -> int:
    """Bytes of all slots in float32, each in extents of 512."""
    return sum(-(-4 * entry.elements // 512) * 512 for entry in Store.open(store).weights)


def parts(store: Path, tokens: int) -> int:
    """What is not slots, for the small store: by hand, as docs/architecture.md has it."""
    opened = Store.open(store)
    config = opened.config
    residents = 4 * sum(math.prod(entry.shape) for entry in opened.residents)
    key_value = (
        config["hidden_size"] // config["num_attention_heads"] * config["num_key_value_heads"]
    )
    kv_cache = 2 * config["num_hidden_layers"] * key_value * 4 * tokens
    widest = (6 * config["hidden_size"] + 8 * key_value) * 4  # attention's, here
    per_token = widest + 2 * config["hidden_size"] * 4
    activations = (64 << 20) + tokens * per_token + 32 * config["vocab_size"]
    return residents + kv_cache + activations + (kv_cache + activations) // 8


def test_slots_get_what_is_left(room: Room, long_store: Path, long_text: list[str]) -> None:
    everything, other = whole(long_store), parts(long_store, 100)
    budget = other + everything // 2
    flags = [f"--model={long_store}", "--context=100", *CPU]
    room.feeders(
        {
            "bounded": [*flags, f"--vram={budget}B"],
            "smaller": [*flags, f"--vram={budget}B", f"--cache={everything // 3}B"],
            "larger": [*flags, f"--vram={budget}B", "--cache=-1"],
            "free": [*flags],
        }
    )
    found = {name: lives.status(room, name) for name in ("bounded", "smaller", "larger", "free")}
    assert {name: fields["arena_bytes"] for name, fields in found.items()} == {
        "bounded": everything // 2,
        "smaller": everything // 3,
        "larger": everything // 2,
        "free": everything,
    }
    caches = [fields["cache"] for fields in found.values()]
    assert caches == ["auto", f"{everything // 3}B", "-1", "auto"]
    assert {fields["strategy"] for fields in found.values()} == {"resident"}
    engine = room.engine("--name=bounded", *lives.engine_flags(60)).wait()
    assert engine.code == 0, engine.err
    assert engine.out.split() == long_text[:60]
    assert lives.status(room, "bounded")["streamed_bytes"] > 0
    # A swap is bounded too.
    swap = room.start("-m", "feeder", "swap", "ring", "--cache=-1", "--name=bounded").wait()
    assert swap.code == 0, swap.err
    assert lives.status(room, "bounded")["arena_bytes"] == everything // 2


def test_who_bounds_is_said(room: Room, long_store: Path) -> None:
    budget = parts(long_store, 100) + whole(long_store) // 2
    flags = (f"--model={long_store}", "--context=100", *CPU, f"--vram={budget}B")
    told = room.feeder(*flags, "--cache=-1", name="told")
    silent = room.feeder(*flags, name="silent")
    told.until_said("cache -1 would take")
    assert "; --vram gives " in told.err and ": cut to that" in told.err
    silent.until_said("serving")
    assert "cut to that" not in silent.err  # nobody asked for more


def test_too_little_is_one_line(room: Room, long_store: Path) -> None:
    ended = room.launch(f"--model={long_store}", *CPU, *LITTLE, "--prompt=1 2 3").wait()
    assert_refused(ended, "error: feeder: --vram gives 70 MB and a run needs at least ", code=1)
    for part in ("KV cache of 900 tokens", "activations of 256 tokens", "a slot for lm_head"):
        assert part in ended.last_line, ended.last_line
    assert ended.out == ""
