"""A conversation on a GPU whose turns keep their keys and values: by the graph, streamed, and over a swap."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common import protocol as p
from engine.generate import Generator, Sampling, Stopped
from engine.logprobs import Logprob, Logprobs
from engine.loop import Loop
from engine.shortage import MemoryKeeper
from engine.step import Step, supports
from engine.steps import Steps
from engine.text import TokenIds
from feeder import control
from feeder.quantize import quantize_checkpoint
from tests import fed
from tests.checkpoints import edit_config, make_checkpoint
from tests.processes import Room
from tests.reference import reference_model

#: Tokens that are new in each turn. The cache has room for 256 at first, and grows amid the second.
NEW = (220, 3, 1, 40, 5, 17)
STOPPED = 2  # the turn whose answer somebody stops


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(
        tmp_path_factory.mktemp("kept") / "model",
        hidden=256, intermediate=576, heads=8, kv_heads=2, layers=3, seed=4,
    )  # fmt: skip
    edit_config(path, max_position_embeddings=2048)
    (path / "generation_config.json").write_text('{"bos_token_id": 0, "pad_token_id": 0}')
    return path


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Path:
    quantize_checkpoint(checkpoint, checkpoint.parent / "store", "cuda", progress=False)
    return checkpoint.parent / "store"


@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("cache_flag", ["-1", "5"])
def test_turns_are_as_near_to_fp32_as_if_told_anew(
    room: Room,
    checkpoint: Path,
    store: Path,
    cache_flag: str,
    swapped: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(room.runtime))
    reference = reference_model(checkpoint, torch.float32, "cuda", attention="eager")
    flags = ("--device=cuda", "--dtype=bfloat16", f"--cache={cache_flag}", "--slots=packed")
    with fed.model(room, store, *flags) as (model, it):
        assert supports(model) == ""
        keeper = MemoryKeeper(model, it.client, it.memory)
        loop = Loop(Steps(Step(model, it.client), None), keeper.survive)
        generator = Generator(model, TokenIds(320), Sampling(), True, loop, keeper.chunk)
        draw = torch.Generator().manual_seed(8)
        text: list[int] = []
        for turn, count in enumerate(NEW):
            prompt = text + torch.randint(320, (count,), generator=draw).tolist()
            told: list[Logprob] = []

            def token(told: list[Logprob] = told, turn: int = turn) -> None:
                if turn == STOPPED and len(told) == 7:
                    raise Stopped

            answer = generator.answer(
                prompt, lambda _: None, token,
                Sampling(max_new_tokens=30, temperature=1, seed=turn),
                reuse=True, logprobs=Logprobs(0, told.append),
            )  # fmt: skip
            assert len(answer.ids) == len(told) == (7 if turn == STOPPED else 30)
            # Nothing but the last token, which may not have been computed.
            assert answer.kept in ((0,) if turn == 0 else (len(text) - 1, len(text)))
            text = prompt + answer.ids
            with torch.inference_mode():
                ids = torch.tensor([text], device="cuda")
                wanted, plain = (m(input_ids=ids).logits[0].float() for m in (reference, model))
            place = slice(len(prompt) - 1, len(text) - 1)
            chosen = torch.tensor(answer.ids, device="cuda")[:, None]
            expected, theirs = (
                torch.log_softmax(logits[place], -1).gather(1, chosen)[:, 0]
                for logits in (wanted, plain)
            )
            ours = torch.tensor([one.value for one in told], device="cuda")
            scale = wanted.std()
            error, bound = ((found - expected).abs().max() / scale for found in (ours, theirs))
            assert error < max(2 * bound, 0.1), (turn, float(error), float(bound))
            if swapped and turn % 2:
                slots = "dequantized" if turn == 1 else "packed"
                control.ask("default", p.Swap("resident", "8", slots), 30)
