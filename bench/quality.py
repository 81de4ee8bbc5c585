"""What quantizing costs in quality: ``python -m bench.quality MODEL STORE --text FILE``.

Compares the next-token distributions of a store with those of the checkpoint that it was made of.
Without STORE, makes one by each method and compares them all. Owns the text and the figures;
`bench.layerwise` runs the models. docs/quality.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.arguments import DTYPES, Parser
from common.entry import run_process
from common.errors import UsageError
from common.log import log
from common.process import Leash
from feeder.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_EPILOG = """\
examples:
  python -m bench.quality ~/models/Qwen2.5-7B STORE --text wikipedia.txt --output 7b.json
  python -m bench.quality MODEL --methods absmax,search --text held-out.txt
"""


@dataclass(frozen=True)
class Texts:
    """Tokens [rows, length], padded with 0 at the end, and how many of each row are text."""

    ids: Any
    lengths: tuple[int, ...]


def parser() -> Parser:
    made = Parser(
        prog="python -m bench.quality",
        description="Compares next-token distributions of a store and of its checkpoint.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("model", type=Path, help="the checkpoint")
    add("store", type=Path, nargs="?", help="the store; default: one by each of --methods")
    add("--methods", default=",".join(METHODS), metavar="A,B", help="default: all")
    add("--text", type=Path, metavar="FILE", help="default: this project's own documents")
    add("--paragraphs", action="store_true", help="each paragraph is a text of its own")
    add("--tokens", type=int, default=16384, metavar="N", help="of the text, at most")
    add("--length", type=int, default=512, metavar="N", help="tokens of a context, at most")
    add("--layers", action="store_true", help="also the error of each layer")
    add("--device", default="auto", help="auto, cuda, cuda:INDEX or cpu")
    add("--dtype", default="float32", choices=DTYPES, help="of both models' arithmetic")
    add("--output", metavar="FILE.json", help="write the figures there, too")
    return made


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    return run_process("quality", verbose=False, work=lambda leash: _work(arguments, leash))


def _work(arguments: argparse.Namespace, leash: Leash) -> None:
    from bench.record import finish
    from common.checksum import checksum

    if arguments.output and not Path(arguments.output).absolute().parent.is_dir():
        raise UsageError(f"output {arguments.output}: its directory does not exist")
    if arguments.tokens < 2 or arguments.length < 2:
        raise UsageError("--tokens and --length: expected at least 2")
    text = _text(arguments.text)
    described = {
        "name": arguments.text.name if arguments.text else "README.md and docs",
        "checksum": checksum(text.encode()),
        "paragraphs": arguments.paragraphs,
    }
    stores = [
        compare(arguments, path, text) | {"method": method, "quantize_s": seconds}
        for path, method, seconds in _stores(arguments)
    ]
    result = {"model": arguments.model.resolve().name, "text": described, "stores": stores}
    print(json.dumps(finish(result, arguments.output), indent=1))


def _stores(arguments: argparse.Namespace) -> Iterator[tuple[Path, str | None, float | None]]:
    """Each store to compare, the method that it was made by, and the seconds that took."""
    from common.store import Store
    from feeder.quantize import quantize_checkpoint

    if arguments.store:
        yield arguments.store, Store.open(arguments.store).method, None
        return
    for method in arguments.methods.split(","):
        with tempfile.TemporaryDirectory(prefix="weight-feeder-quality-") as directory:
            path, begun = Path(directory) / "store", time.monotonic()
            quantize_checkpoint(arguments.model, path, arguments.device, False, method=method)
            yield path, method, round(time.monotonic() - begun, 2)


def _text(path: Path | None) -> str:
    pages = [path] if path else [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    try:
        return "\n\n".join(page.read_text(encoding="utf-8") for page in pages)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"text {path}: {error}: give a file of UTF-8 text") from error


def compare(arguments: argparse.Namespace, store_dir: Path, text: str) -> dict[str, Any]:
    """All figures of one store. Raises UsageError if it is none of this model."""
    import torch

    from bench.layerwise import Pair, of_checkpoint, of_store
    from common.checkpoint import Checkpoint
    from common.store import Store
    from feeder.quantize import choose_device

    checkpoint, store = Checkpoint.open(arguments.model), Store.open(store_dir)
    if store.config != checkpoint.config:
        raise UsageError(f"store {store_dir} is of another config than {arguments.model}")
    device, dtype = choose_device(arguments.device), getattr(torch, arguments.dtype)
    texts = tokenize(arguments, checkpoint.config, text)
    begun = time.monotonic()
    models = of_checkpoint(checkpoint, device, dtype), of_store(store, device, dtype)
    pair = Pair(arguments.model, models, texts.ids.to(device))
    layers = []
    for index, error in enumerate(pair.layers()):
        layers.append(asdict(error))
        log.info("layer %d of %d", index + 1, checkpoint.config["num_hidden_layers"])
    figures = _figures(pair, texts)
    store.close()
    return {
        "fingerprint": store.fingerprint,
        "packed_bytes": store.packed_bytes,
        "tokens": sum(texts.lengths),
        "contexts": len(texts.lengths),
        "dtype": arguments.dtype,
        **figures,
        **({"layers": layers} if arguments.layers else {}),
        "measure_s": round(time.monotonic() - begun, 2),
    }


def tokenize(arguments: argparse.Namespace, config: dict[str, Any], text: str) -> Texts:
    """The text as rows of tokens. Raises UsageError if nothing in it can be predicted."""
    import torch
    from transformers import AutoTokenizer

    from common.families import windows

    length = min(arguments.length, config.get("max_position_embeddings", arguments.length))
    length = min([length, *(window for window in windows(config) if window is not None)])
    if not any((arguments.model / name).is_file() for name in _VOCABULARIES):
        # transformers would make an empty tokenizer of nothing
        raise UsageError(f"{arguments.model} has no tokenizer: put its tokenizer.json there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"{arguments.model} has no tokenizer that can be read: {error}") from error
    parts = re.split(r"\n\s*\n", text.strip()) if arguments.paragraphs else [text]
    rows: list[list[int]] = []
    left = arguments.tokens
    for part in parts:
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"][:left]
        left -= len(ids)
        rows += [ids[at : at + length] for at in range(0, len(ids), length)]
    rows = [row for row in rows if len(row) > 1]  # the first token of a row is not predicted
    if not rows:
        raise UsageError("the text has fewer than two tokens: give a longer one")
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row)
    return Texts(padded, tuple(len(row) for row in rows))


def _figures(pair: Any, texts: Texts) -> dict[str, float]:
    """Of every token but the first of each row. The divergence is that of the store's distribution
    from the original's, in nats."""
    import torch

    predicted = [length - 1 for length in texts.lengths]
    wanted = torch.cat(
        [row[1 : count + 1] for row, count in zip(texts.ids, predicted, strict=True)]
    )
    divergences, losses, agreements, first = [], [], 0, 0
    for logits in pair.logits(predicted):
        original, quantized = (part.log_softmax(-1) for part in logits)
        divergences.append((original.exp() * (original - quantized)).sum(-1).double().cpu())
        agreements += int((original.argmax(-1) == quantized.argmax(-1)).sum())
        targets = wanted[first : first + len(original), None].to(original.device)
        both = [-part.gather(-1, targets)[:, 0].double().cpu() for part in (original, quantized)]
        losses.append(torch.stack(both))
        first += len(original)
    divergence, loss = torch.cat(divergences), torch.cat(losses, 1).mean(1)
    return {
        "kl_mean": float(divergence.mean()),
        "kl_p99": float(divergence.sort().values[math.ceil(0.99 * len(divergence)) - 1]),
        "perplexity_original": math.exp(float(loss[0])),
        "perplexity": math.exp(float(loss[1])),
        "top1_agreement": agreements / len(divergence),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
