"""Greedy text with candidates is that of the plain model, whatever the cache; and of a whole run."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch

from feeder.quantize import quantize_checkpoint
from tests import fed, speculating
from tests.checkpoints import make_checkpoint
from tests.process.test_launch import DEMO_TEXT, summary_of
from tests.processes import Room, assert_refused
from tests.reference import reference_model

CACHES = ("1", "7", "-1")
pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS, NEW_TOKENS = 200, 10


def prompts() -> list[list[int]]:
    """Random ones, of which some repeat themselves."""
    draw = random.Random(11)
    found = []
    for _ in range(PROMPTS):
        tokens = [draw.randrange(2, 320) for _ in range(draw.randint(1, 12))]
        found.append(tokens * draw.randint(1, 3))
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", layers=1, seed=3)


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Path:
    quantize_checkpoint(checkpoint, checkpoint.parent / "store", "cpu", progress=False)
    return checkpoint.parent / "store"


@pytest.fixture(scope="module")
def draft_store(checkpoint: Path) -> Path:
    """Of the same model, quantized in a worse way: it often says the same, and often not."""
    path = checkpoint.parent / "draft"
    quantize_checkpoint(checkpoint, path, "cpu", progress=False, method="absmax")
    return path


def test_greedy_text_of_200_prompts(
    room: Room, checkpoint: Path, store: Path, draft_store: Path
) -> None:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    plain = reference_model(checkpoint, torch.float32)
    expected = [
        plain.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        for prompt in prompts()
    ]
    feeder_flags = [f"--model={store}", f"--draft={draft_store}"]
    flags = {f"cache{c}": [*feeder_flags, f"--cache={c}"] for c in CACHES}
    for name, feeder in room.feeders(flags).items():
        with fed.connected(room, feeder, name) as engine:
            model, speculation = fed.build(engine), speculating.lookup()
            loop = speculating.loop(speculation)
            for prompt, tokens in zip(prompts(), expected, strict=True):
                assert speculating.generate(model, prompt, loop, **options) == tokens
            figures = speculation.figures()
            assert 100 < figures["accepted"] < 0.9 * figures["candidates"]  # both were met often
            passes = PROMPTS + figures["passes"]
            assert engine.client.stats.uses == passes * len(engine.store.weights)
            assert passes < 0.8 * sum(map(len, expected))
            drafting = speculating.Always(4)
            loop = speculating.loop(drafting, fed.draft(engine))
            for prompt, tokens in zip(prompts(), expected, strict=True):
                assert speculating.generate(model, prompt, loop, **options) == tokens
            figures = drafting.figures()
            assert 0.2 * figures["candidates"] < figures["accepted"] < 0.95 * figures["candidates"]


def test_a_run_says_what_it_did(room: Room, demo_store: Path) -> None:
    """The demo's working repeats itself."""
    flags = ("--model", demo_store, "--json")
    off = room.launch(*flags, "--cache=9", "--speculate=off").wait()
    fields = summary_of(off)
    assert (off.code, off.out, fields["speculate"]) == (0, DEMO_TEXT, "off"), off.err
    on = room.launch(*flags, "--cache=9", "--speculate=lookup:4").wait()
    fields = summary_of(on)
    assert (on.code, on.out, fields["speculate"]) == (0, DEMO_TEXT, "lookup:4"), on.err
    assert fields["wide_passes"] <= fields["candidates"] <= 4 * fields["wide_passes"]
    assert 0 < fields["accepted"] < fields["candidates"]
    # Each pass adds a token of its own; but the last, if the end was a candidate.
    assert fields["passes"] - (fields["tokens"] - 1 - fields["accepted"]) in (0, 1)
    assert fields["tokens_per_pass"] == pytest.approx(
        (fields["tokens"] - 1) / fields["passes"], abs=1e-3
    )
    assert fields["streamed_bytes"] < summary_of(off)["streamed_bytes"]


def test_auto_leaves_what_is_resident_alone(room: Room, demo_store: Path) -> None:
    flags = ("--model", demo_store, "--json")
    resident = room.launch(*flags, "--cache=-1", "--wait-full").wait()
    fields = summary_of(resident)
    assert (resident.code, resident.out) == (0, DEMO_TEXT), resident.err
    assert fields["candidates"] == 0 and fields["passes"] == fields["tokens"] - 1
    streamed = room.launch("--model", demo_store, "--cache=9").wait()
    assert (streamed.code, streamed.out) == (0, DEMO_TEXT), streamed.err
    words = r"; lookup: \d\.\d\d tokens a pass, \d+ % of \d+ candidates accepted, about -?[\d.]+ s"
    assert re.search(words, streamed.err.replace(", which does not pay here and rests", ""))


@pytest.mark.parametrize("command", [["launch.py"], ["-m", "engine"]])
def test_a_mistake_in_the_flag(room: Room, command: list[str]) -> None:
    ended = room.start(*command, "--prompt=1", "--speculate=lookup:99").wait()
    assert_refused(ended, "speculate 'lookup:99': a pass checks from 1 to 15 candidates")
