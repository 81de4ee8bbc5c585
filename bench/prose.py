"""Train a small Qwen2 on real text: ``python -m bench.prose OUT``. A model to measure quality on.

The text is what a machine with Python has: the docstrings of the standard library, and Debian's
common licenses where they are. Owns the text, its split and the training. Knows nothing of stores.
Beside the checkpoint lies ``held-out.txt``, of files that were not trained on.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import sys
import sysconfig
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from bench.exercises import exercises

VOCABULARY = 1024
END = "<|endoftext|>"
HELD_OUT_ONE_IN = 16
HELD_OUT_FILE = "held-out.txt"
_LICENSES = Path("/usr/share/common-licenses")
_NO_PROSE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
_SHORTEST = 200  # characters of a docstring: shorter ones are labels more than text


def documents() -> Iterator[tuple[str, str]]:
    """Name and text of each file that has prose, in an order that is always the same."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if not _NO_PROSE.intersection(inside.parts):
            text = "\n\n".join(_docstrings(path))
            if text:
                yield inside.as_posix(), text
    for path in sorted(_LICENSES.glob("*")) if _LICENSES.is_dir() else ():
        if path.is_file() and not path.is_symlink():
            yield path.name, path.read_text(encoding="utf-8", errors="replace")


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in others' sources
            tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds):
            text = ast.get_docstring(node) or ""
            if len(text) >= _SHORTEST:
                yield text


def split() -> tuple[list[str], list[str]]:
    """The documents to train on, and those that are held out, chosen by a hash of their names."""
    sides: tuple[list[str], list[str]] = ([], [])
    for name, text in documents():
        sides[zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0].append(text)
    return sides


def build_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """Qwen2's tokenizer, with a vocabulary learned from ``texts``."""
    merger = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    merger.train_from_iterator(texts, trainer)
    learned = json.loads(merger.to_str())["model"]
    ranked = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocabulary = {t: i for i, t in enumerate(t for t in ranked if t != END)}
    vocabulary[END] = len(vocabulary)
    merges: Any = [tuple(pair) for pair in learned["merges"]]  # its type says text
    return Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token=END, pad_token=END)


def new_model(
    tokens: Qwen2Tokenizer, hidden: int, layers: int, copying: bool = False
) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights: heads of 64, two query heads to a key/value head. ``copying``: it
    begins with what makes that quick to learn, tied embeddings and a head that looks one token back."""
    end: Any = tokens.convert_tokens_to_ids(END)
    config = Qwen2Config(
        vocab_size=len(tokens),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=1024,
        tie_word_embeddings=copying,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = Qwen2ForCausalLM(config)
    if copying:
        _look_back(model)
    model.generation_config = GenerationConfig(do_sample=False, bos_token_id=end, eos_token_id=end)
    return model


@torch.no_grad()
def _look_back(model: Qwen2ForCausalLM) -> None:
    """The first layer's first head, by its biases: the rotations of a query and of the key one position
    before it agree."""
    attention: Any = model.model.layers[0].self_attn
    pairs, used, strength = 32, 8, 6.0  # of a head of 64; the fastest, which tell neighbours apart
    angles = 10_000.0 ** (-torch.arange(used) / pairs)
    attention.k_proj.bias[:used] = strength
    attention.q_proj.bias[:used] = strength * angles.cos()
    attention.q_proj.bias[pairs : pairs + used] = -strength * angles.sin()


@torch.no_grad()
def _grow(model: Qwen2ForCausalLM, path: Path) -> None:
    """``model`` begins as the one in ``path``, which has fewer layers: those it has more add nothing yet."""
    small = Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.load_state_dict(small.state_dict(), strict=False)
    for layer in model.model.layers[small.config.num_hidden_layers :]:
        added: Any = layer
        added.self_attn.o_proj.weight.zero_()
        added.mlp.down_proj.weight.zero_()


def train(model: Qwen2ForCausalLM, ids: torch.Tensor, args: argparse.Namespace) -> None:
    """Train until the time is up; the rate falls to 0 with the clock, so any machine finishes."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
    begun, step = time.monotonic(), 0
    while (progress := (time.monotonic() - begun) / (60 * args.minutes)) < 1:
        starts = torch.randint(len(ids) - args.length, (args.batch, 1))
        rows = ids[starts + torch.arange(args.length)]
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = args.rate * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0:
            print(f"{progress:4.0%}  step {step}, loss {loss.item():.3f}", file=sys.stderr)


def main() -> None:
    """Parse the command line, train, save the checkpoint and the held-out text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the checkpoint's directory")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 128")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument(
        "--exercises", type=int, default=0, metavar="N", help="copies and lists to train on, too"
    )
    parser.add_argument(
        "--grown-from",
        type=Path,
        metavar="DIR",
        help="begin as this, of the same width, with fewer layers",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    texts, held_out = split()
    tokens = build_tokenizer(texts)
    texts += exercises(texts, args.exercises, args.seed)
    rows = tokens(texts, add_special_tokens=False)["input_ids"]
    end: Any = tokens.convert_tokens_to_ids(END)
    ids = torch.tensor([token for row in rows for token in (*row, end)])
    model = new_model(tokens, args.hidden, args.layers, args.exercises > 0)
    if args.grown_from:
        _grow(model, args.grown_from)
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(ids)} tokens to train on, {size} parameters", file=sys.stderr)
    train(model, ids, args)
    movable: Any = model  # its type takes a model where a dtype goes
    movable.to(torch.bfloat16).save_pretrained(args.out)
    tokens.save_pretrained(args.out)
    (args.out / HELD_OUT_FILE).write_text("\n\n".join(held_out), encoding="utf-8")


if __name__ == "__main__":
    main()
