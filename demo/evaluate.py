"""Measure the demo checkpoint: `python -m demo.evaluate demo/model --sums 2000 --int4`.

Owns the count of right answers among random held-out sums. Decodes with plain transformers, so
its figures say what the checkpoint can do, not what the feeder and the engine do with it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.logging import disable_progress_bar

from common.int4 import dequantize, quantize
from demo import sums
from demo.tokenizer import prompt_and_completion

MOST_TOKENS = 128


@torch.no_grad()
def send_through_int4(model: nn.Module) -> int:
    """Replace each Linear's weight by what INT4 leaves of it; returns how many there were."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    for weight in weights:
        weight.copy_(dequantize(*quantize(weight), weight.shape, weight.dtype))
    return len(weights)


@torch.no_grad()
def decode(model: PreTrainedModel, tokenizer: Tokenizer, prompts: list[str]) -> list[str]:
    """Greedy completions, with their special tokens."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    batch = batch.to(model.device)
    generator: Any = model  # its type has no ``generate``, which comes from a mixin
    ids = generator.generate(**batch, do_sample=False, max_new_tokens=MOST_TOKENS)
    new = ids[:, batch["input_ids"].shape[1] :]
    return [text.split(tokenizer.pad_token)[0] for text in tokenizer.batch_decode(new)]


def measure(
    model: PreTrainedModel, tokenizer: Tokenizer, items: list[sums.Sum], chat: bool, batch: int
) -> dict[str, object]:
    """Fractions of sums with the right answer and with the whole working right.

    An answer counts only if it is in the box that ends the text and an end token follows.
    """
    answers, workings, wrong = 0, 0, []
    for first in range(0, len(items), batch):
        chunk = items[first : first + batch]
        pairs = [prompt_and_completion(tokenizer, item, chat) for item in chunk]
        texts = decode(model, tokenizer, [prompt for prompt, _ in pairs])
        for item, text, (_, wanted) in zip(chunk, texts, pairs, strict=True):
            ended = text.endswith(tokenizer.eos_token)
            right = ended and sums.boxed(text.removesuffix(tokenizer.eos_token)) == item.answer
            answers += right
            workings += text == wanted
            if not right:
                wrong.append(item.prompt)
    count = len(items)
    return {"answers": answers / count, "workings": workings / count, "wrong": wrong[:5]}


def main() -> None:
    """Parse the command line, load the model, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--sums", type=int, default=200)
    parser.add_argument("--int4", action="store_true", help="send the weights through INT4")
    parser.add_argument(
        "--striking", action="store_true", help="numbers of one or two different digits"
    )
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    disable_progress_bar()
    started = time.monotonic()
    rng = random.Random(args.seed)
    items = [sums.draw(rng, held_out=True, striking=args.striking) for _ in range(args.sums)]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model = model.to(args.device).eval()
    weights = "bf16"
    if args.int4:
        weights = f"INT4 ({send_through_int4(model)} Linears), dequantized to bf16"
    found = {
        form: measure(model, tokenizer, items, form == "chat", args.batch)
        for form in ("raw", "chat")
    }
    gpu = args.device.startswith("cuda")
    device = torch.cuda.get_device_name(args.device) if gpu else args.device
    summary = {"weights": weights, "device": device, "sums": args.sums}
    print(
        json.dumps(
            {
                **summary,
                "striking": args.striking,
                **found,
                "seconds": round(time.monotonic() - started, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
