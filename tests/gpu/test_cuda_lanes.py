"""Several tokens in one pass on a GPU have the bits of single ones, so texts are those without candidates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common import protocol as p
from engine.lane import MOST_LANES
from engine.steps import DENSE_LANES, steps_for
from feeder.quantize import quantize_checkpoint
from tests import fed, lives
from tests.checkpoints import make_model
from tests.process.test_launch import DEMO_TEXT, summary_of
from tests.processes import DEMO, Room
from tests.stepping import LAYER, take_in_passes

LONG = LAYER | {"max_position_embeddings": 8192, "sliding_window": 8192, "num_hidden_layers": 3}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "head norms": {"model_type": "qwen3"},
    # As wide as kernels of real models are chosen by, so that their programs fill the device.
    "wide": {
        "model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16,
        "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 8192,
    },
    # o_proj and lm_head cannot be packed.
    "mixed": {
        "model_type": "mistral", "num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 330,
    },
}  # fmt: skip
#: How wide, and how many of their tokens are kept.
PASSES = ((2, 2), (5, 3), (16, 16), (8, 8), (1, 1), (16, 5), (3, 1), (5, 5))
#: From 4096 on attention sums in another order.
KNOWN = (20, 700, 4090)


@pytest.mark.parametrize("slots", ["packed", "dequantized"])
@pytest.mark.parametrize("name", MODELS)
def test_to_the_last_bit(room: Room, tmp_path: Path, name: str, slots: str) -> None:
    """Streamed, one by one, and held, where single tokens are a CUDA graph."""
    checkpoint = make_model(tmp_path / "model", LONG | MODELS[name])
    quantize_checkpoint(checkpoint, tmp_path / "store", "cuda", progress=False)
    flags = ("--device=cuda", "--dtype=bfloat16", f"--slots={slots}", "--cache=4")
    with fed.model(room, tmp_path / "store", *flags, attention="sdpa") as (model, engine):
        steps = steps_for(model, engine.client)
        assert steps is not None
        for strategy, cache in (("ring", "4"), ("on-demand", "1"), ("resident", "-1")):
            lives.ask(room, p.Swap(strategy, cache))
            for known in KNOWN:
                take_in_passes(steps, steps.several, model, known, PASSES, seed=known)
                assert steps.most == (MOST_LANES if slots == "packed" else DENSE_LANES)
                assert steps.packed == (slots == "packed")
            all_packed = slots == "packed" and name != "mixed"
            assert steps.graphed == (all_packed and cache == "-1")
            steps.rest()


@pytest.fixture(scope="module")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "store"
    quantize_checkpoint(DEMO, path, "cuda", progress=False)
    return path


def asked() -> Iterator[tuple[str, ...]]:
    yield ("--speculate=lookup:8",)
    yield (f"--speculate={DEMO.parent / 'draft'}",)
    yield ()  # auto


SAMPLED = ("--temperature=1.5", "--seed=5", "--max-new-tokens=100")


@pytest.mark.parametrize("sampling", [(), SAMPLED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("slots", ["packed", "dequantized"])
def test_the_text_is_that_without_candidates(
    room: Room, demo_store: Path, slots: str, sampling: tuple[str, ...]
) -> None:
    common = (f"--model={demo_store}", "--json", "--cache=4", f"--slots={slots}", *sampling)
    off = room.launch(*common, "--speculate=off").wait()
    assert off.code == 0, off.err
    assert sampling or off.out == DEMO_TEXT
    for flags in asked():
        ended = room.launch(*common, *flags).wait()
        fields = summary_of(ended)
        assert (ended.code, ended.out) == (0, off.out), ended.err
        assert fields["speculation_off"] == ""
        # That they pay is no matter of this: of a small model none may.
        assert fields["candidates"] > 0, (flags, fields)


def test_what_is_resident_is_left_alone(room: Room, demo_store: Path) -> None:
    """A pass over several tokens would take as long as they do one after the other."""
    common = (f"--model={demo_store}", "--json", "--cache=-1", "--wait-full", "--slots=packed")
    for flags in asked():
        ended = room.launch(*common, *flags).wait()
        fields = summary_of(ended)
        assert (ended.code, ended.out) == (0, DEMO_TEXT), ended.err
        assert (fields["candidates"], fields["speculation_off"]) == (0, "all weights stay")


def test_without_a_step_auto_leaves_texts_alone(room: Room, demo_store: Path) -> None:
    common = (f"--model={demo_store}", "--json", "--cache=4", "--no-step")
    for sampling in ((), SAMPLED):
        ended = room.launch(*common, *sampling).wait()
        fields = summary_of(ended)
        assert ended.code == 0, ended.err
        assert fields["candidates"] == 0
        assert fields["speculation_off"].startswith("rounding could change this text")
