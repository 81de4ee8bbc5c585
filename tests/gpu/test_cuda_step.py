"""The fused step and its CUDA graph: logits of a model that computes in fp32, and safe under swaps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common import protocol as p
from engine.cache import as_argument, make_cache, reserve
from engine.step import Step, supports
from feeder import control
from feeder.quantize import quantize_checkpoint
from tests import fed
from tests.checkpoints import make_checkpoint
from tests.processes import Room
from tests.reference import reference_model

PROMPT = [5, 17, 300, 2, 88, 41]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("step")
    return make_checkpoint(
        path / "model", hidden=256, intermediate=576, heads=8, kv_heads=2, layers=3,
        tied=bool(request.param), seed=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Path:
    quantize_checkpoint(checkpoint, checkpoint.parent / "store", "cuda", progress=False)
    return checkpoint.parent / "store"


def expected_logits(checkpoint: Path, ids: list[int]) -> torch.Tensor:
    """Of every position, by transformers in fp32 with the dequantized weights."""
    reference = reference_model(checkpoint, torch.float32, "cuda", attention="eager")
    with torch.inference_mode():
        return reference(torch.tensor([ids], device="cuda")).logits[0]


def stepped(step: Step, model: object, ids: list[int], cache: object) -> list[torch.Tensor]:
    """The logits after each of ``ids``, taken one by one."""
    found = []
    for token in ids:
        reserve(cache, cache.get_seq_length() + 1)  # type: ignore[arg-type, attr-defined]
        logits = step(torch.tensor([[token]], device="cuda"), cache)  # type: ignore[arg-type]
        found.append(logits[0].clone())
    return found


@pytest.mark.parametrize("cache_flag", ["-1", "5", "2", "1"])
@pytest.mark.parametrize("slots", ["packed", "dequantized"])
def test_logits_are_those_of_fp32(
    room: Room, checkpoint: Path, store: Path, cache_flag: str, slots: str
) -> None:
    generator = torch.Generator().manual_seed(8)
    ids = PROMPT + torch.randint(320, (300,), generator=generator).tolist()
    expected = expected_logits(checkpoint, ids)
    flags = ("--device=cuda", "--dtype=bfloat16", f"--cache={cache_flag}", f"--slots={slots}")
    with fed.model(room, store, *flags) as (model, engine), torch.inference_mode():
        assert supports(model) == ""
        step = Step(
            model, engine.client
        )  # takes dequantized weights too, though no loop asks it to
        cache = make_cache(model.config.num_hidden_layers, len(PROMPT) + 1)
        prompt = torch.tensor([PROMPT], device="cuda")
        model(input_ids=prompt, **as_argument(cache), use_cache=True, logits_to_keep=1)
        found = stepped(step, model, ids[len(PROMPT) :], cache)
        step.rest()
        plain = model(input_ids=torch.tensor([ids], device="cuda")).logits[0].float()
        scale = expected.std()
        ours = torch.stack([
            (got - want).abs().max() for got, want in zip(found, expected[len(PROMPT) :], strict=True)
        ]).max() / scale  # fmt: skip
        theirs = (plain - expected).abs().max() / scale  # of transformers in bf16
        assert theirs > 0
        assert ours <= 1.5 * theirs, (float(ours), float(theirs))


def test_the_cache_does_not_show(room: Room, store: Path) -> None:
    """The same bits whatever is granted together, streamed or resident, graphed or not."""
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(320, (90,), generator=generator).tolist()
    found = {}
    for cache_flag, strategy in (
        ("-1", "resident"),
        ("9", "resident"),
        ("4", "ring"),
        ("1", "ring"),
    ):
        name = f"cache{cache_flag}"
        flags = (
            f"--cache={cache_flag}",
            f"--strategy={strategy}",
            "--slots=packed",
        )
        feeder = room.feeder(
            "--model", store, "--device=cuda", "--dtype=bfloat16", *flags, name=name
        )
        with fed.connected(room, feeder, name) as engine, torch.inference_mode():
            model = fed.build(engine)
            step = Step(model, engine.client)
            cache = make_cache(model.config.num_hidden_layers, 8)
            prompt = torch.tensor([PROMPT], device="cuda")
            output = model(input_ids=prompt, **as_argument(cache), use_cache=True)
            found[cache_flag] = torch.stack(
                [output.logits[0, -1].float(), *stepped(step, model, ids, cache)]
            )
            step.rest()
    for other in ("9", "4", "1"):
        assert torch.equal(found["-1"], found[other]), other


def test_a_swap_under_the_graph(room: Room, checkpoint: Path, store: Path) -> None:
    """The graph is dropped when a weight is wanted back, the text goes on, and a new one is made."""
    flags = ("--device=cuda", "--dtype=bfloat16", "--cache=-1", "--slots=packed")
    with fed.model(room, store, *flags) as (model, engine), torch.inference_mode():
        step = Step(model, engine.client)

        def run(disturb: bool) -> tuple[list[int], list[bool]]:
            cache = make_cache(model.config.num_hidden_layers, 8)
            prompt = torch.tensor([PROMPT], device="cuda")
            model(input_ids=prompt, **as_argument(cache), use_cache=True, logits_to_keep=1)
            token, tokens, graphed = 7, [], []
            for number in range(60):
                if disturb and number in (20, 35, 45):
                    swap = {20: ("ring", "3"), 35: ("resident", "-1"), 45: ("on-demand", "4")}[
                        number
                    ]
                    ask_meanwhile(room, engine, p.Swap(*swap))
                (logits,) = stepped(step, model, [token], cache)
                token = int(logits.argmax())
                tokens.append(token)
                graphed.append(step.graphed)
            step.rest()
            return tokens, graphed

        calm, graphed = run(disturb=False)
        assert all(graphed[5:])
        moved, graphed = run(disturb=True)
        assert moved == calm
        assert graphed[19] and not graphed[25] and graphed[44] and not graphed[50]


def ask_meanwhile(room: Room, engine: fed.Engine, request: p.Message) -> None:
    """Ask the feeder in another thread, as another process would, while this one goes on."""
    import threading
    import time

    def ask() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_RUNTIME_DIR", str(room.runtime))
            control.ask("default", request, 60)

    threading.Thread(target=ask, daemon=True).start()
    time.sleep(0.5)
