"""Packed copies on the device: dequantized slots, the same logits, and weights that cross the link once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.store import Store
from feeder.quantize import quantize_checkpoint
from tests import fed, lives
from tests.checkpoints import make_checkpoint
from tests.processes import Room
from tests.reference import all_logits, reference_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its store, of which everything packed is far larger than a page."""
    path = tmp_path_factory.mktemp("copies")
    checkpoint = make_checkpoint(
        path / "model", hidden=1024, intermediate=4096, layers=4, vocab=4000, heads=8, kv_heads=2
    )
    quantize_checkpoint(checkpoint, path / "store", "cuda", progress=False)
    return checkpoint, path / "store"


@pytest.mark.parametrize(
    ("share", "all_near"),
    [(0.4, False), (0.6, True), (0.9, True)],  # of what all dequantized slots take
)
def test_logits_and_traffic(
    room: Room, models: tuple[Path, Path], share: float, all_near: bool
) -> None:
    checkpoint, path = models
    store = Store.open(path)
    size = int(share * 2 * sum(entry.elements for entry in store.weights))
    flags = (f"--cache={size}B", "--slots=dequantized", "--device=cuda", "--dtype=bfloat16")
    with fed.model(room, path, *flags) as (model, engine):
        reference = reference_model(checkpoint, torch.bfloat16, "cuda")
        expected = all_logits(reference)
        for _ in range(2):
            for ours, theirs in zip(all_logits(model), expected, strict=True):
                assert torch.equal(ours, theirs), (ours - theirs).abs().max()
        before = engine.client.ask_status()
        assert before["copies"] > 0
        all_logits(model)
        after = engine.client.ask_status()
        assert after["fills"] > before["fills"]
        crossed = after["streamed_bytes"] - before["streamed_bytes"]
        assert crossed < 5 * store.packed_bytes
        assert (crossed == 0) == all_near
        if all_near:
            assert after["hit_rate"] == 1.0


def test_a_swap_to_ring_streams_everything_again(room: Room, models: tuple[Path, Path]) -> None:
    path = models[1]
    size = int(0.6 * 2 * sum(entry.elements for entry in Store.open(path).weights))
    flags = (f"--cache={size}B", "--slots=dequantized", "--device=cuda", "--dtype=bfloat16")
    with fed.model(room, path, *flags) as (model, engine):
        expected = all_logits(model)
        assert engine.client.ask_status()["copies"] > 0
        for strategy, copies in (("ring", False), ("resident", True)):
            ended = room.start("-m", "feeder", "swap", strategy).wait()
            assert ended.code == 0, ended.err
            for ours, theirs in zip(all_logits(model), expected, strict=True):
                assert torch.equal(ours, theirs)
            assert bool(lives.status(room)["copies"]) == copies
