"""Several sequences in a pass on a GPU: logits of a model that computes in fp32, and texts under swaps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common import protocol as p
from engine.batch.attention import Part
from engine.batch.batch import Batch
from engine.batch.passes import Passes
from engine.cache import make_cache
from engine.generate import Generator, Sampling
from engine.loop import Loop
from engine.shortage import MemoryKeeper
from engine.step import Step, supports
from engine.steps import Steps
from engine.text import TokenIds
from feeder import control
from feeder.quantize import quantize_checkpoint
from tests import fed
from tests.batching import Owner
from tests.checkpoints import make_checkpoint
from tests.processes import Room
from tests.reference import reference_model

LENGTHS = (1, 6, 90, 300, 20)  # of the prompts
DECODED = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batch")
    return make_checkpoint(
        path / "model", hidden=256, intermediate=576, heads=8, kv_heads=2, layers=3, seed=4
    )


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Path:
    quantize_checkpoint(checkpoint, checkpoint.parent / "store", "cuda", progress=False)
    return checkpoint.parent / "store"


@pytest.mark.parametrize("cache_flag", ["-1", "5", "1"])
@pytest.mark.parametrize("slots", ["packed", "dequantized"])
def test_logits_are_those_of_fp32(
    room: Room, checkpoint: Path, store: Path, cache_flag: str, slots: str
) -> None:
    """Of texts that are given. They join one after the other, and the first is alone at first."""
    generator = torch.Generator().manual_seed(8)
    texts = [torch.randint(320, (n + DECODED,), generator=generator).tolist() for n in LENGTHS]
    reference = reference_model(checkpoint, torch.float32, "cuda", attention="eager")
    with torch.inference_mode():
        expected = [reference(torch.tensor([ids], device="cuda")).logits[0] for ids in texts]
    flags = ("--device=cuda", "--dtype=bfloat16", f"--cache={cache_flag}", f"--slots={slots}")
    with fed.model(room, store, *flags) as (model, engine):
        assert supports(model) == ""
        passes = Passes(model, Steps(Step(model, engine.client), None))
        found: list[list[torch.Tensor]] = [[] for _ in texts]
        caches = [make_cache(3, n + 1) for n in LENGTHS]
        for turn in range(DECODED + 2 * len(texts)):
            parts, who = [], []
            for one, (ids, prompt) in enumerate(zip(texts, LENGTHS, strict=True)):
                made = len(found[one])
                if 2 * one <= turn and made <= DECODED:
                    start = 0 if made == 0 else prompt + made - 1
                    end = prompt + made
                    parts.append(Part(tuple(ids[start:end]), start, caches[one]))
                    who.append(one)
            if parts:
                for one, logits in zip(who, passes(parts), strict=True):
                    found[one].append(logits[0].float().clone())
        passes.rest()
        with torch.inference_mode():
            plain = [model(input_ids=torch.tensor([ids], device="cuda")).logits[0] for ids in texts]
    for ids, want, other, got, prompt in zip(texts, expected, plain, found, LENGTHS, strict=True):
        assert len(got) == DECODED + 1 and len(ids) == prompt + DECODED
        scale = want.std()
        wanted = want[prompt - 1 :]
        ours = (torch.stack(got) - wanted).abs().max() / scale
        theirs = (other.float()[prompt - 1 :] - wanted).abs().max() / scale  # transformers in bf16
        assert ours < max(2 * theirs, 0.1), (prompt, float(ours), float(theirs))


def test_swaps_change_no_text(room: Room, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots hold packed weights before and after, and so the same kernels compute the same."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(room.runtime))
    with fed.model(room, store, "--device=cuda", "--dtype=bfloat16", "--cache=-1") as (model, it):
        keeper = MemoryKeeper(model, it.client, it.memory)
        step = Steps(Step(model, it.client), None)
        generator = Generator(
            model, TokenIds(320), Sampling(), True, Loop(step, keeper.survive), keeper.chunk
        )

        def answers(swapped: bool) -> list[list[int]]:
            batch = Batch(model, Passes(model, step, keeper.survive), keeper, 16)
            owners = [
                Owner(generator, [k + 1, 7, 9], Sampling(max_new_tokens=40, seed=k, temperature=1))
                for k in range(16)
            ]
            for owner in owners:
                batch.add(owner)
            turn = 0
            while not batch.idle:
                batch.turn()
                turn += 1
                if swapped and turn % 10 == 0:
                    cache = ("3", "-1", "8", "-1")[turn // 10 % 4]
                    control.ask("default", p.Swap("resident", cache, "packed"), 30)
            batch.rest()
            return [owner.ids for owner in owners]

        undisturbed = answers(False)
        assert answers(True) == undisturbed
        assert len({tuple(ids) for ids in undisturbed}) == 16


@pytest.mark.parametrize("cache_flag", ["-1", "5"])
def test_one_alone_is_answered_as_without_a_batch(room: Room, store: Path, cache_flag: str) -> None:
    """By the same kernels, with a graph and without; also after others were there."""
    flags = ("--device=cuda", "--dtype=bfloat16", f"--cache={cache_flag}", "--slots=packed")
    with fed.model(room, store, *flags) as (model, it):
        keeper = MemoryKeeper(model, it.client, it.memory)
        step = Steps(Step(model, it.client), None)
        generator = Generator(
            model, TokenIds(320), Sampling(), True, Loop(step, keeper.survive), keeper.chunk
        )
        batch = Batch(model, Passes(model, step, keeper.survive), keeper, 16)
        for seed in range(4):
            how = Sampling(max_new_tokens=50, seed=seed, temperature=1)
            prompt = [seed + 1, 44, 3, 2]
            alone = generator.answer(prompt, lambda text: None, sampling=how).ids
            owners = [Owner(generator, prompt, how)]
            batch.add(owners[0])
            while not batch.idle:
                batch.turn()
            batch.rest()
            assert owners[0].ids == alone
            others = [Owner(generator, [n, n], Sampling(max_new_tokens=5)) for n in range(3, 8)]
            for other in others:
                batch.add(other)
            while not batch.idle:
                batch.turn()
            batch.rest()
            assert all(1 <= len(other.ids) <= 5 for other in others)
