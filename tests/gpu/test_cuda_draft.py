"""A draft model on the GPU: packed, and a CUDA graph a token; it proposes what its model would say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from feeder.quantize import quantize_checkpoint
from tests import fed
from tests.checkpoints import make_checkpoint
from tests.process.test_launch import DEMO_TEXT, summary_of
from tests.processes import DEMO, Room
from tests.reference import reference_model

SIZES = {"hidden": 256, "intermediate": 576, "heads": 8, "kv_heads": 2}


@pytest.fixture(scope="module")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "store"
    quantize_checkpoint(DEMO, path, "cuda", progress=False)
    return path


def test_it_proposes_what_its_model_would_say(room: Room, tmp_path: Path) -> None:
    """By logits in fp32, up to near ties; over many proposals, of which parts are dropped again."""
    small = make_checkpoint(tmp_path / "small", layers=2, seed=5, **SIZES)
    large = make_checkpoint(tmp_path / "large", layers=3, seed=6, **SIZES)
    for path in (small, large):
        quantize_checkpoint(path, path.with_suffix(".store"), "cuda", progress=False)
    flags = ("--cache=3", f"--draft={small.with_suffix('.store')}", "--device=cuda")
    reference = reference_model(small, torch.float32, "cuda", attention="eager")
    with fed.engine(room, large.with_suffix(".store"), *flags) as engine, torch.inference_mode():
        model, draft = fed.build(engine), fed.draft(engine)
        text = [5, 17, 300, 2, 88, 41]
        model(input_ids=torch.tensor([text], device="cuda"))  # from now on both are lent
        for turn in range(12):
            ids = torch.tensor([text], device="cuda")
            found = draft.propose(ids, 6, lambda _, logits: (logits.argmax(-1, keepdim=True), None))
            assert len(found.tokens) == 6
            whole = torch.tensor([text + found.tokens], device="cuda")
            logits = reference(whole).logits[0, len(text) - 1 : -1]
            chosen = logits.gather(1, whole[0, len(text) :, None])[:, 0]
            assert (logits.max(-1).values - chosen < 0.1 * logits.std(-1)).all()
            text += [*found.tokens[: turn % 7], (7 * turn) % 320]
        assert draft.graphed


def test_a_run_with_a_draft(room: Room, demo_store: Path) -> None:
    for cache in ("9", "-1"):
        flags = (f"--model={demo_store}", f"--speculate={DEMO.parent / 'draft'}", "--json")
        ended = room.launch(*flags, f"--cache={cache}").wait()
        fields = summary_of(ended)
        assert (ended.code, ended.out) == (0, DEMO_TEXT), ended.err
        assert cache == "-1" or fields["drafted_passes"] > 0
