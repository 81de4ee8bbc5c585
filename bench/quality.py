"""What quantizing costs in quality: ``python -m bench.quality MODEL STORE --text FILE``.

Compares the next-token distributions of a store with those of the checkpoint that it was made of.
Without STORE, makes one by each method and compares them all. Owns the command line and the table;
`feeder.divergence` measures. docs/quality.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.arguments import DTYPES, Parser
from common.entry import run_process
from common.errors import UsageError
from common.log import log
from common.process import Leash
from feeder.methods import CALIBRATED, METHODS, rule
from feeder.texts import CALIBRATION, MEASUREMENT, Excerpt, Rows, Text, tokenizer_home

if TYPE_CHECKING:
    from feeder.checkpoints.source import Source

_EPILOG = """\
examples:
  python -m bench.quality ~/models/Qwen2.5-7B STORE --text wikipedia.txt --output 7b.json
  python -m bench.quality MODEL --methods absmax,search --text held-out.txt
"""
_HEADER = (
    f"{'method':10} {'KL mean':>9} {'KL p99':>9} {'perplexity':>11} {'(original)':>11}"
    f" {'agreement':>10} {'CPU s':>8}"
)


def parser() -> Parser:
    made = Parser(
        prog="python -m bench.quality",
        usage="%(prog)s MODEL [STORE] [FLAGS]",
        description="Compares next-token distributions of a store and of its checkpoint.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    everything = ",".join([*METHODS, *CALIBRATED])
    add("model", type=Path, help="the checkpoint")
    add("store", type=Path, nargs="?", help="the store; default: one by each of --methods")
    add("--methods", metavar="A,B", help=f"default: {everything}")
    add("--text", type=Path, metavar="FILE", help="default: a sample that comes with Python")
    add("--paragraphs", action="store_true", help="each paragraph is a text of its own")
    add("--tokens", type=int, default=MEASUREMENT.tokens, metavar="N", help="of it, at most")
    add("--length", type=int, default=MEASUREMENT.length, metavar="N", help="of a context, at most")
    add("--calibration", type=Path, metavar="FILE", help="for gptq; default: of the same sample")
    add("--calibration-tokens", type=int, default=CALIBRATION.tokens, metavar="N", help="of it")
    add("--layers", action="store_true", help="also the error of each layer")
    add("--device", default="auto", help="auto, cuda, cuda:INDEX or cpu")
    add("--dtype", default="float32", choices=DTYPES, help="of both models' arithmetic")
    add("--json", action="store_true", help="print the figures as JSON, not as a table")
    add("--output", metavar="FILE.json", help="write the figures there, too")
    return made


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    return run_process("quality", verbose=False, work=lambda leash: _work(arguments, leash))


def _work(arguments: argparse.Namespace, leash: Leash) -> None:
    from bench.record import finish
    from feeder.checkpoints.recognize import open_source

    if arguments.output and not Path(arguments.output).absolute().parent.is_dir():
        raise UsageError(f"output {arguments.output}: its directory does not exist")
    excerpt = Excerpt(
        arguments.text, arguments.tokens, arguments.length, measured=True,
        paragraphs=arguments.paragraphs,
    )  # fmt: skip
    calibration = replace(
        CALIBRATION, path=arguments.calibration, tokens=arguments.calibration_tokens,
        paragraphs=arguments.paragraphs,
    )  # fmt: skip
    source, text = open_source(arguments.model), excerpt.text()
    methods = [] if arguments.store else _methods(arguments.methods, source)
    with tempfile.TemporaryDirectory(prefix="weight-feeder-quality-") as scratch:
        home = tokenizer_home(source.companions(Path(scratch)), arguments.model)
        rows = excerpt.rows(home, source.config)
        if CALIBRATED.keys() & set(methods):
            calibration.rows(home, source.config)  # a mistake in it should not be found at the end
    described = {
        "name": text.name,
        "checksum": text.checksum,
        "paragraphs": arguments.paragraphs,
    }
    # Each line as it comes: a method that fails does not take the others' figures along.
    say = log.info if arguments.json else _print
    stores = []
    say(_HEADER)
    for path, method, seconds in _stores(arguments, methods, calibration):
        found = compare(arguments, source, path, text, rows)
        stores.append(found | {"method": method, **seconds})
        say(line(stores[-1]))
    result = {"model": arguments.model.resolve().name, "text": described, "stores": stores}
    record = finish(result, arguments.output)
    if arguments.json:
        print(json.dumps(record, indent=1))
    else:
        for error in layer_lines(stores):
            print(error)


def _print(line: str) -> None:
    print(line, flush=True)


def _methods(named: str | None, source: Source) -> list[str]:
    """The methods of --methods, by default all that can be had. UsageError if one is none of them."""
    from feeder.quantize import has_values, require_values

    if named is None:
        return [*METHODS, *(CALIBRATED if has_values(source) else ())]
    for name in named.split(","):
        if name in CALIBRATED:
            require_values(source, name)
        else:
            rule(name)
    return named.split(",")


def _stores(
    arguments: argparse.Namespace, methods: list[str], calibration: Excerpt
) -> Iterator[tuple[Path, str | None, dict[str, float]]]:
    """Each store to compare, the method that it was made by, and the seconds that took, if it is known:
    by the clock, and of all CPU cores together."""
    from common.store import Store
    from feeder.quantize import quantize_checkpoint

    if arguments.store:
        yield arguments.store, Store.open(arguments.store).method, {}
        return
    for method in methods:
        with tempfile.TemporaryDirectory(prefix="weight-feeder-quality-") as directory:
            path, begun = Path(directory) / "store", (time.monotonic(), time.process_time())
            quantize_checkpoint(
                arguments.model, path, arguments.device, progress=False, method=method,
                calibration=calibration,
            )  # fmt: skip
            ended = time.monotonic(), time.process_time()
            took = [round(after - before, 2) for before, after in zip(begun, ended, strict=True)]
            yield path, method, {"quantize_s": took[0], "quantize_cpu_s": took[1]}


def compare(
    arguments: argparse.Namespace, source: Source, store_dir: Path, text: Text, rows: Rows
) -> dict[str, Any]:
    """All figures of one store. Raises UsageError if it is none of this model."""
    import torch

    from common.store import Store
    from feeder import divergence
    from feeder.layerwise import of_source, of_store
    from feeder.quantize import choose_device

    store = Store.open(store_dir)
    if store.config != source.config:
        raise UsageError(f"store {store_dir} is of another config than {arguments.model}")
    device, dtype = choose_device(arguments.device), getattr(torch, arguments.dtype)
    begun = time.monotonic()
    models = of_source(source, device, dtype), of_store(store, device, dtype)
    layers: list[dict[str, float]] = []

    def note(error: divergence.LayerError) -> None:
        layers.append(asdict(error))
        log.info("layer %d of %d", len(layers), source.config["num_hidden_layers"])

    try:
        quality = divergence.compare(source.config, models, text, rows, device, note=note)
    except ValueError as error:
        raise UsageError(
            f"{arguments.model} and {store_dir} cannot be compared: {error}"
        ) from error
    store.close()
    figures = quality.as_json()
    del figures["text"], figures["text_checksum"]  # said once, for all stores
    return {
        "fingerprint": store.fingerprint,
        "packed_bytes": store.packed_bytes,
        "contexts": len(rows.lengths),
        "dtype": arguments.dtype,
        **figures,
        **({"layers": layers} if arguments.layers else {}),
        "measure_s": round(time.monotonic() - begun, 2),
    }


def line(store: dict[str, Any]) -> str:
    """The figures of one store for people, below `_HEADER`."""
    seconds = f"{store['quantize_cpu_s']:.1f}" if "quantize_cpu_s" in store else ""
    return (
        f"{store['method'] or 'unknown':10} {store['kl_mean']:9.3g} {store['kl_p99']:9.3g}"
        f" {store['perplexity']:11.5g} {store['perplexity_original']:11.5g}"
        f" {100 * store['top1_agreement']:8.1f} % {seconds:>8}"
    )


def layer_lines(stores: list[dict[str, Any]]) -> list[str]:
    """The errors of the layers, if there are any."""
    return [
        f"{store['method'] or 'unknown':10} layer {index}: error of the weights"
        f" {layer['weights']:.3g}, behind the layer {layer['hidden']:.3g}"
        for store in stores
        for index, layer in enumerate(store.get("layers", ()))
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
