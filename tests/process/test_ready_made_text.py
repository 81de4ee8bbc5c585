"""launch.py takes ready-made checkpoints; the text is that of transformers with the values they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from common import int4
from feeder import methods
from tests.gguf_files import all_as, write_gguf
from tests.processes import DEMO, Room
from tests.ready_made import awq, gptq, random_weight, write
from tests.unit.test_compressed_tensors import Library, settings

NEW_TOKENS = 12


def quantized(values: torch.Tensor) -> torch.Tensor:
    """What becomes of values that the store cannot hold."""
    packed = int4.quantize(values, methods.rule(methods.DEFAULT))
    return int4.dequantize(*packed, values.shape, torch.float32)


def continued(checkpoint: Path, values: dict[str, torch.Tensor], prompt: list[int]) -> list[int]:
    """The tokens that plain transformers adds, with these values as its weights."""
    config = Qwen2Config.from_pretrained(checkpoint)
    model = Qwen2ForCausalLM(config).to(torch.float32).eval()
    model.load_state_dict({name: value.float() for name, value in values.items()})
    found = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed-tensors"])
def test_codes_are_kept(room: Room, tmp_path: Path, kind: str) -> None:
    if kind == "compressed-tensors":
        how, encode = settings(symmetric=True, group_size=128), Library(True, 128).encode
    else:
        how = {"quant_method": kind, "bits": 4, "group_size": 128, "desc_act": False}
        encode = {"gptq": gptq, "awq": awq}[kind]
    checkpoint = tmp_path / "model"
    values = write(checkpoint, how, random_weight, encode)
    flags = ["--greedy", f"--max-new-tokens={NEW_TOKENS}", "--device=cpu"]
    ended = room.launch(f"--model={checkpoint}", "--prompt=5 17 30 2", *flags).wait()
    assert ended.code == 0, ended.err
    said = f"quantize: converted from {kind}: 100.0% of the blocks bit for bit; relative"
    assert said in ended.err
    values["lm_head.weight"] = quantized(values["lm_head.weight"])
    tokens = continued(checkpoint, values, [5, 17, 30, 2])
    assert ended.out.split() == [str(token) for token in tokens]
    assert len(set(tokens)) > 3


def test_gguf(room: Room, tmp_path: Path) -> None:
    file = tmp_path / "demo.gguf"
    values = write_gguf(file, DEMO, all_as(Type.Q8_0), tokenizer=DEMO)
    prompt = "12.5+7.25=?"
    flags = ["--greedy", f"--max-new-tokens={NEW_TOKENS}", "--device=cpu", "--raw"]
    ended = room.launch(f"--model={file}", f"--prompt={prompt}", *flags).wait()
    assert ended.code == 0, ended.err
    assert "gguf checkpoint: 57 weights in Q8_0" in ended.err
    assert "100.0% quantized again by weighted" in ended.err
    for name, value in values.items():
        if name.endswith(("_proj.weight", "lm_head.weight")):
            values[name] = quantized(value)
    embedding = "model.embed_tokens.weight"
    values[embedding] = values[embedding].bfloat16()
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokens = continued(DEMO, values, tokenizer(prompt).input_ids)
    assert ended.out == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"
