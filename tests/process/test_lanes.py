"""Several tokens in one pass of the fused step give what they give one after the other, to the last bit.

In Triton's interpreter, which runs one program after the other; tests/gpu/test_cuda_lanes.py has what
programs that run at once do to each other, and CUDA graphs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.dequantize import interpreted
from common.memory import memory_for
from common.store import Store
from engine.cache import as_argument, make_cache, past
from engine.client import WeightClient
from engine.model import build_model
from engine.step import Step, misfit
from feeder.quantize import quantize_checkpoint
from tests.checkpoints import make_model
from tests.processes import ROOT, Room
from tests.stepping import LAYER, take_in_passes

#: As small as can be packed: the interpreter takes some 20 ms for each program of a kernel.
TINY = LAYER | {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 64,
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "packed": ({"model_type": "qwen3", "tie_word_embeddings": True}, "--cache=6"),
    # o_proj and lm_head cannot be packed, and nothing is granted together.
    "mixed": ({"model_type": "qwen2", "num_attention_heads": 3, "vocab_size": 75}, "--cache=1"),
}
#: How many tokens there are before, and passes: how wide, and how many of their tokens are kept.
#: Attention takes tiles of 64 tokens.
PAST = {"packed": 63, "mixed": 127}
PASSES = {"packed": ((3, 1), (1, 1)), "mixed": ((2, 2),)}


def test_to_the_last_bit(room: Room, tmp_path: Path) -> None:
    flags = {}
    for name, (config, own) in MODELS.items():
        checkpoint = make_model(tmp_path / name, TINY | config, seed=len(name))
        store = tmp_path / f"{name}.store"
        quantize_checkpoint(checkpoint, store, "cpu", progress=False)
        flags[name] = ["--model", store, "--slots=packed", own]
    room.feeders(flags)
    done = subprocess.run(
        [sys.executable, "-m", "tests.process.test_lanes", room.directory("")],
        env=room.environment | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(MODELS)


def compare(name: str, directory: Path) -> None:
    client = WeightClient(directory / name)
    try:
        welcome = client.wait_for_feeder()
        memory = memory_for(welcome.device)
        client.use(memory)
        model = build_model(Store.open(Path(welcome.store)), client, memory, torch.float32)
        assert misfit(model) == ""
        step = Step(model, client)
        take_in_passes(step, step.several, model, PAST[name], PASSES[name], seed=len(name))
        if name == "packed":
            refuses_what_finds_no_room(step, model)
    finally:
        client.close()


@torch.inference_mode()
def refuses_what_finds_no_room(step: Step, model: Any) -> None:
    cache = make_cache(model.config.num_hidden_layers, 250)
    ids = torch.zeros((1, 250), dtype=torch.int64)
    model(input_ids=ids, **as_argument(cache), use_cache=True, logits_to_keep=1)
    with pytest.raises(ValueError, match="the cache holds 256 tokens, and 250 are there"):
        step.several(ids[:, :7], cache)
    with pytest.raises(ValueError, match="17 tokens: a pass takes from 1 to 16"):
        step.several(ids[:, :17], cache)
    assert past(cache)[0].get_seq_length() == 250


if __name__ == "__main__":
    assert interpreted()
    torch.set_num_threads(1)
    for model_name in MODELS:
        compare(model_name, Path(sys.argv[1]))
        print(model_name)
