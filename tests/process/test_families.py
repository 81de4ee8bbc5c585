"""Every family through the pipeline: logits and text are those of the plain model, whatever the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from engine.cache import as_argument, make_cache, windows_of
from engine.generate import Generator, Sampling
from engine.linear import FedLinear
from engine.loop import Loop
from engine.text import codec_for
from feeder.quantize import quantize_checkpoint
from tests import fed
from tests.checkpoints import make_model
from tests.families import MODELS
from tests.process.test_logits import assert_same
from tests.processes import Room
from tests.reference import all_logits, reference_model

PROMPT = [5, 17, 101, 2, 88, 41, 9, 77, 3, 120, 64]  # longer than any window
TOKENS = 24
#: One feeder each: of a weight at a time, of some, of all, packed and not.
FLAGS = {
    "qwen2, the last layer with a window": ["--cache=1"],
    "qwen3, biases, windows by layer": ["--cache=2", "--slots=dequantized"],
    "llama, biases, ungrouped": ["--cache=-1"],
    "mistral": ["--cache=7", "--strategy=ring"],
}


def cached_logits(model: Any, cache: Any) -> list[torch.Tensor]:
    """Of a prompt in pieces and of single tokens after it, far beyond any window, by this cache."""
    ids = torch.randint(160, (1, 80), generator=torch.Generator().manual_seed(6))
    found, at = [], 0
    with torch.inference_mode():
        for count in (30, 20, 1, 1, 7, 1):
            tokens, at = ids[:, at : at + count], at + count
            found.append(model(tokens, **as_argument(cache), use_cache=True).logits)
    return found


def greedy(model: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    output = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    return list(output[0, len(PROMPT) :].tolist())


@pytest.mark.usefixtures("one_thread")
def test_logits_and_text_are_those_of_the_plain_model(room: Room, tmp_path: Path) -> None:
    flags, checkpoints = {}, {}
    for number, model_name in enumerate(FLAGS):
        checkpoint = make_model(tmp_path / f"model{number}", MODELS[model_name], seed=number)
        store = tmp_path / f"store{number}"
        quantize_checkpoint(checkpoint, store, "cpu", progress=False)
        flags[f"of{number}"] = [f"--model={store}", *FLAGS[model_name]]
        checkpoints[f"of{number}"] = model_name, checkpoint
    for name, feeder in room.feeders(flags).items():
        model_name, checkpoint = checkpoints[name]
        reference = reference_model(checkpoint, torch.float32)
        with fed.connected(room, feeder, name) as engine:
            model = fed.build(engine)
            assert type(model) is type(reference)
            linears = sum(isinstance(module, FedLinear) for module in model.modules())
            assert linears == len(engine.store.weights)
            assert_same(all_logits(model), all_logits(reference), model_name)
            ours = make_cache(3, 1, windows=windows_of(model.config))
            theirs = DynamicCache(config=reference.config)
            assert_same(cached_logits(model, ours), cached_logits(reference, theirs), model_name)
            sampling = Sampling(greedy=True, max_new_tokens=TOKENS)
            model.generation_config.eos_token_id = None
            loop = Loop(None, lambda call, _: call())
            generator = Generator(model, codec_for(engine.store), sampling, True, loop)
            with torch.inference_mode():
                text = generator.answer(" ".join(map(str, PROMPT)), lambda _: None)
            assert text.ids == greedy(reference), model_name
