"""What the pipeline must equal: transformers' own model with the dequantized weights in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from common import int4
from engine.cache import CACHE_ARGUMENT, as_argument
from feeder import methods
from tests.checkpoints import load_tensors


def reference_model(
    checkpoint: Path,
    dtype: torch.dtype,
    device: str = "cpu",
    attention: str = "sdpa",
) -> Any:
    """The checkpoint as transformers loads it, each Linear's weight quantized and dequantized.

    Goes from the checkpoint's own tensors through `common.int4` alone: no store, no host store.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation=attention, local_files_only=True
    )
    original = load_tensors(checkpoint)
    tied = model.config.tie_word_embeddings
    changed = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not (tied and name == "lm_head"):
            weight = original[f"{name}.weight"]
            codes, scales = int4.quantize(weight, methods.rule(methods.DEFAULT))
            module.weight = nn.Parameter(int4.dequantize(codes, scales, weight.shape, dtype))
            changed += 1
    assert changed == 7 * model.config.num_hidden_layers + (not tied)
    return model.to(device).eval().requires_grad_(False)


def all_logits(model: Any) -> list[torch.Tensor]:
    """Logits of a batch's prefill, of three cached decode steps, and of a longer prompt."""
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(5)
    batch = torch.randint(vocabulary, (3, 13), generator=generator).to(model.device)
    prompt = torch.randint(vocabulary, (1, 40), generator=generator).to(model.device)
    with torch.inference_mode():
        output = model(batch, use_cache=True)
        logits = [output.logits]
        for _ in range(3):
            batch = output.logits[:, -1:].argmax(-1)
            output = model(batch, **as_argument(output[CACHE_ARGUMENT]), use_cache=True)
            logits.append(output.logits)
        logits.append(model(prompt).logits)
    return logits
