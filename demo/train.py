"""Train the demo checkpoint: `python -m demo.train --out demo/model`.

Owns the model's shape, the clock and the checkpoint. Knows nothing of the feeder, the engine or
the store.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.logging import disable_progress_bar

from demo import tokenizer
from demo.rows import draw_pool, draw_rows, inputs_and_targets
from demo.trainer import LossFunction, Rows, Trainer, mean_loss

_STARTED = time.monotonic()


def new_model(hidden: int, layers: int, inner: int) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights: heads of 32, three query heads to a key/value head. ``inner``: the
    width between gate and down."""
    tokens = tokenizer.build()
    special = {"eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
    special["bos_token_id"] = tokens.pad_token_id  # as Qwen2 has it; never put before a prompt
    config = Qwen2Config(
        vocab_size=len(tokens),
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 96,
        max_position_embeddings=512,
        initializer_range=0.05,  # the default, 0.02, is meant for far wider models
        tie_word_embeddings=False,
        **special,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, **special)
    return model


def log(text: str) -> None:
    """Progress on stderr, with the seconds since the start."""
    print(f"{time.monotonic() - _STARTED:6.1f} s  {text}", file=sys.stderr, flush=True)


def usable_loss(compile_it: bool, trainer: Trainer, batch: Rows) -> LossFunction:
    """The loss, compiled if that works here: it is only faster, never needed."""
    if compile_it:
        compiled = torch.compile(mean_loss, dynamic=False)
        try:
            compiled(trainer.model, *batch).backward()
            return compiled
        except Exception as error:  # the compiler fails in as many ways as there are machines
            log(f"training without torch.compile: {type(error).__name__}: {error}"[:2000])
        finally:
            trainer.model.zero_grad(set_to_none=True)
    return mean_loss


def train(args: argparse.Namespace, trainer: Trainer, pool: Rows, held_out: Rows) -> None:
    """Train until the time is up; keep the checkpoint that does best on held-out sums.

    The rate falls to 0 with the clock, not with a count of steps, so that any machine finishes.
    """
    tokens = tokenizer.build()
    pad, device = tokens.pad_token_id, args.device

    def batch_of(size: int) -> Rows:
        picked = torch.randint(len(pool[0]), (size,), device=device)
        return inputs_and_targets(pool[0][picked], pool[1][picked], pad)

    test = inputs_and_targets(*held_out, pad)
    loss_of = usable_loss(args.compile, trainer, batch_of(args.batch))
    begun, end = time.monotonic(), _STARTED + 60 * args.minutes
    best, step, next_score = (0.0, -math.inf), 0, 0.1
    log("training")
    while (progress := (time.monotonic() - begun) / (end - begun)) < 1:
        rate = args.rate * min(1, (step + 1) / args.warmup) * (1 + math.cos(math.pi * progress)) / 2
        int4 = progress > args.int4_from and step % 2 == 1
        loss = trainer.step(loss_of, batch_of(args.batch), rate, int4)
        step += 1
        if step % 20 == 0:
            value = loss.item()  # waits for the device, so that the clock above is its clock
            if step % 200 == 0:
                log(f"step {step}, loss {value:.5f}, {'INT4' if int4 else 'bf16'}, {rate:.1e}")
        if progress > next_score or step == 20:
            next_score = progress + 0.05
            best = keep_best(trainer, best, test, tokens, args.out)
    log(f"{step} steps")
    keep_best(trainer, best, test, tokens, args.out)


def keep_best(trainer: Trainer, best: tuple, test: Rows, tokens: Tokenizer, out: Path) -> tuple:
    """Save the masters as bf16 if they score no worse than the best so far; the better score."""
    right, losses = trainer.score(test)
    log(
        f"held out: bf16 {right[0]:.4f} right, loss {losses[0]:.5f}; "
        f"INT4 {right[1]:.4f} right, loss {losses[1]:.5f}"
    )
    found = (min(right), -max(losses))
    if not found >= best:  # so written, it also turns a loss of NaN down
        return best
    trainer.load(int4=False)
    trainer.model.save_pretrained(out)
    tokens.save_pretrained(out)
    return found


def moved(rows: Rows, device: str) -> Rows:
    """The rows on another device."""
    return rows[0].to(device), rows[1].to(device)


def main() -> None:
    """Parse the command line, draw the sums, train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=2, help="from start to the last step")
    parser.add_argument("--hidden", type=int, default=192, help="a multiple of 96")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--inner", type=int, help="default: 8/3 of --hidden")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--examples", type=int, default=600_000)
    parser.add_argument("--held-out", type=int, default=2048, help="sums to choose the best by")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--int4-from", type=float, default=0.4, help="fraction of the time")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    disable_progress_bar()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the drawing processes are forks
    pool = draw_pool(args.seed, args.examples, args.workers)
    rows, starts = draw_rows(args.seed + 1, args.held_out, held_out=True)
    held_out = torch.from_numpy(rows), torch.from_numpy(starts)
    log(f"{len(pool[0])} sums drawn")
    torch.manual_seed(args.seed)
    model = new_model(args.hidden, args.layers, args.inner or args.hidden * 8 // 3)
    log(f"{sum(p.numel() for p in model.parameters())} parameters on {args.device}")
    trainer = Trainer(model, args.device)
    train(args, trainer, moved(pool, args.device), moved(held_out, args.device))


if __name__ == "__main__":
    main()
