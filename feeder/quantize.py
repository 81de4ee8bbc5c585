"""Make a store from a checkpoint: `python -m feeder.quantize MODEL_DIR STORE_DIR`.

Owns the walk over a checkpoint's tensors and the command line. Knows nothing of file formats
(`feeder.checkpoints`, `common.store_writer`) nor of the arithmetic (`feeder.convert`, `feeder.methods`).

One tensor at a time, in pieces, in the order of the checkpoint's files: memory holds one piece
and one weight's codes. torch is imported late, so that a signal during its import is obeyed and
a launcher may import this module.
"""

from __future__ import annotations

import argparse
import math
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from common.blocks import BLOCK, code_bytes, scale_count
from common.checkpoint import EMBEDDING, HEAD
from common.checkpoint_fingerprint import checkpoint_fingerprint
from common.checksum import as_bytes
from common.config import format_bytes
from common.entry import run_process
from common.errors import CheckpointError, MemoryShortageError, UsageError
from common.families import expected_tensors, is_tied
from common.log import log
from common.parser import Parser
from common.process import Leash, Terminated
from common.progress import progress as show_progress
from common.store import Store, StoreWriter
from feeder import methods
from feeder.checkpoints.recognize import open_source
from feeder.texts import CALIBRATION, MEASUREMENT, Excerpt, tokenizer_home

if TYPE_CHECKING:
    import torch

    from common.int4 import Rule
    from feeder.checkpoints.source import Grouped, Part, Source
    from feeder.convert import Tally

_OF_VALUES = ("original", "gguf")  # kinds of which hardly any block is kept as it is
_EXAMPLES = """\
  python -m feeder.quantize ~/models/Qwen2.5-7B-Instruct stores/7b
"""

__all__ = ["checkpoint_fingerprint", "main", "quantize_checkpoint"]


def quantize_checkpoint(
    model_dir: Path | str,
    store_dir: Path | str,
    device: str = "auto",
    progress: bool = True,
    poll: Callable[[], None] = lambda: None,
    method: str = methods.DEFAULT,
    calibration: Excerpt = CALIBRATION,
    measurement: Excerpt | None = None,
) -> Store:
    """Quantize the checkpoint at `model_dir`, of any kind that there is, into a new store in `store_dir`.

    device: "cpu", "cuda", "cuda:1", or "auto" for the GPU if there is one. progress: show it
    on stderr. poll: called between pieces; whatever it raises stops the work and leaves nothing.
    method: one of `feeder.methods`; what a ready-made checkpoint has quantized is kept where it can be.
    calibration: the text for a method that takes one. measurement: the text to measure the store on, when
    it is there; its quality is then in its index.
    Raises ConfigError, CheckpointError, StoreError, UsageError or MemoryShortageError.
    """
    from feeder.convert import Tally

    rule = None if method in methods.CALIBRATED else methods.rule(method)
    source = open_source(Path(model_dir))
    parts = source.parts()
    if rule is None:
        require_values(source, method)
    _, residents = expected_tensors(source.config)
    chosen = choose_device(device)
    tally = Tally()
    if source.note:
        what = "all of it" if rule is None else "what a store cannot hold of it"
        log.info(
            "%s: %s checkpoint: %s; %s is quantized again by %s",
            model_dir, source.kind, source.note, what, method,
        )  # fmt: skip
    with ExitStack() as stack:
        scratch = stack.enter_context(TemporaryDirectory(prefix="weight-feeder-"))
        companions = source.companions(Path(scratch))
        home = tokenizer_home(companions, Path(model_dir))
        rows = None if rule is not None else calibration.rows(home, source.config)
        if measurement is not None:
            measurement.rows(home, source.config)
        if rows is not None or measurement is not None:
            _require_layers(source.config)
        writer = StoreWriter(
            store_dir,
            source.config,
            {part.name: part.dtype for part in parts if part.name in residents},
            source_fingerprint=checkpoint_fingerprint(model_dir),
            copies=companions,
            method=method,
            source_format=source.kind,
        )
        stack.enter_context(writer)
        total_bytes = sum(part.bytes for part in parts)
        bar = stack.enter_context(show_progress(total_bytes, "quantizing", enabled=progress))
        if rows is not None:
            from feeder.calibration import calibrated

            sizes = {part.name: part for part in parts}
            for name, codes, scales in calibrated(source, rows, chosen, poll):
                part = sizes.pop(f"{name}.weight")
                writer.add_weight(name, part.shape, codes, scales)
                bar.update(part.bytes)
            parts = [part for part in parts if part.name in sizes]
        for part in parts:
            pieces = _watched(source, part, chosen, poll, bar.update)
            if part.name in residents:
                writer.add_resident_pieces(part.name, _finite(part.name, pieces))
            elif part.name == HEAD and is_tied(source.config):
                _require_equal(pieces, source.pieces(EMBEDDING, chosen))
            elif rule is not None:
                packed = _quantize(part, pieces, chosen, rule, tally)
                writer.add_weight(part.name.removesuffix(".weight"), part.shape, *packed)
        poll()
        writer.commit()
    if tally.blocks:
        log.info("%s", tally.said(source.kind, method))
    store = Store.open(store_dir)
    if measurement is None:
        return store
    from feeder.measured import measure

    return measure(source, store, measurement, chosen, poll)


def has_values(source: Source) -> bool:
    """Whether the checkpoint's weights are values, and not codes that are best kept."""
    return source.kind in _OF_VALUES


def require_values(source: Source, method: str) -> None:
    """UsageError if a checkpoint has none that the method, a calibrated one, could go by."""
    if not has_values(source):
        raise UsageError(
            f"--method {method} is for originals and GGUF files: the checkpoint is {source.kind},"
            " and its codes are kept as they are; leave --method out"
        )


def _require_layers(config: dict[str, Any]) -> None:
    """ConfigError if transformers cannot run such a model: that should not be found at the end."""
    import torch

    from feeder.layerwise import Decoder

    Decoder(config, torch.device("cpu"))


def choose_device(device: str) -> torch.device:
    """The torch device that `device` names. Raises UsageError if there is no such device."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"--device {device}: expected auto, cuda, cuda:INDEX or cpu") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: expected auto, cuda, cuda:INDEX or cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: torch finds no such device; use auto or cpu")
    return chosen


def _watched(
    source: Source,
    part: Part,
    device: torch.device,
    poll: Callable[[], None],
    count: Callable[[int], object],
) -> Iterator[Any]:
    """The pieces of a tensor; polls before each, counts its bytes when it has been worked on."""
    elements, seen = math.prod(part.shape), 0
    for piece in source.pieces(part.name, device):
        poll()
        yield piece
        before, seen = seen, seen + piece.numel()
        count(part.bytes * seen // elements - part.bytes * before // elements)


def _finite(name: str, pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same pieces; CheckpointError if a value is NaN or Inf."""
    for piece in pieces:
        extremes = piece.aminmax()  # both are NaN if any value is
        if not math.isfinite(extremes.min) or not math.isfinite(extremes.max):
            raise CheckpointError(f"{name}: found NaN or Inf, expected finite values")
        yield piece


def _require_equal(head: Iterator[Any], embedding: Iterator[Any]) -> None:
    for one, other in zip(head, embedding, strict=True):
        if one.dtype != other.dtype or as_bytes(one) != as_bytes(other):
            raise CheckpointError(
                "lm_head.weight differs from the embedding, although the config ties them; "
                "set tie_word_embeddings to false in config.json if both are meant"
            )


def _quantize(
    part: Part,
    pieces: Iterator[torch.Tensor | Grouped],
    device: torch.device,
    rule: Rule,
    tally: Tally,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, on the CPU, of a weight that comes in pieces of whole blocks."""
    import torch

    from feeder.convert import pack

    elements = math.prod(part.shape)
    codes = torch.empty(code_bytes(elements), dtype=torch.uint8)
    scales = torch.empty(scale_count(elements), dtype=torch.bfloat16)
    first = 0
    try:
        for piece in pieces:
            piece_codes, piece_scales = pack(piece, device, rule, tally if part.ready else None)
            codes[first // 2 :][: piece_codes.numel()] = piece_codes.cpu()
            scales[first // BLOCK :][: piece_scales.numel()] = piece_scales.cpu()
            first += piece.numel()
    except ValueError as error:
        raise CheckpointError(f"{part.name}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise MemoryShortageError(
            f"the GPU has no room for {part.name}, {list(part.shape)}; use --device cpu"
        ) from error
    return codes, scales


def _watch_for_the_end(leash: Leash) -> Callable[[], None]:
    """A function that raises Terminated once a signal has come, or the launcher has gone.

    A handler that raised could interrupt the very cleanup. A second signal kills at once: what
    then stays behind is removed by the next run.
    """
    received: list[int] = []

    def note(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    def poll() -> None:
        if leash.fd is not None and select.select([leash.fd], [], [], 0)[0]:
            received.append(signal.SIGTERM)
        if received:
            raise Terminated(received[0])

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return poll


def _excerpts(arguments: argparse.Namespace) -> tuple[Excerpt, Excerpt | None]:
    """What to calibrate by, and what to measure on. UsageError."""
    path, tokens = arguments.calibration, arguments.calibration_tokens
    if arguments.method not in methods.CALIBRATED and (path, tokens) != (None, None):
        flag = "--calibration" if path is not None else "--calibration-tokens"
        raise UsageError(
            f"{flag} is of no use to --method {arguments.method}, which needs no data:"
            f" give --method {' or '.join(methods.CALIBRATED)}, or leave it out"
        )
    if arguments.text is not None and not arguments.measure:
        raise UsageError("--text is what --measure measures on: give both, or neither")
    tokens = CALIBRATION.tokens if tokens is None else tokens
    measurement = replace(MEASUREMENT, path=arguments.text) if arguments.measure else None
    return replace(CALIBRATION, path=path, tokens=tokens), measurement


def make_parser() -> Parser:
    """The parser of this command."""
    parser = Parser(
        "quantize", examples=_EXAMPLES, usage="%(prog)s MODEL_DIR STORE_DIR [FLAGS]",
        prog="python -m feeder.quantize", description="Makes an INT4 store from a checkpoint.",
    )  # fmt: skip
    parser.add_argument(
        "model_dir", type=Path,
        help="a checkpoint in safetensors (bf16, fp16, fp32, GPTQ, AWQ, compressed-tensors) or a GGUF file",
    )  # fmt: skip
    every = methods.METHODS | methods.CALIBRATED
    parser.add_argument("store_dir", type=Path, help="the store to make; must not exist")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:INDEX or cpu")
    parser.add_argument(
        "--method",
        default=methods.DEFAULT,
        choices=tuple(every),
        help="; ".join(f"{name}: {what}" for name, what in every.items())
        + f"; default: {methods.DEFAULT}",
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="the text for --method gptq: plain, or JSON lines as --prompts takes them if it is named"
        " .jsonl; default: a sample that comes with Python",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-tokens", type=int, metavar="N",
        help=f"of it, at most; default: {CALIBRATION.tokens}",
    )  # fmt: skip
    parser.add_argument(
        "--measure", action="store_true",
        help="then compare the store with the checkpoint, and note the figures in its index",
    )  # fmt: skip
    parser.add_argument(
        "--text", type=Path, metavar="FILE",
        help="to measure on, as --calibration; default: another part of that sample",
    )  # fmt: skip
    return parser


def main(argv: list[str]) -> int:
    """Run the command line `argv`; returns the exit code."""
    arguments = make_parser().parse_args(argv)

    def work(leash: Leash) -> None:
        poll = _watch_for_the_end(leash)
        calibration, measurement = _excerpts(arguments)
        try:
            store = quantize_checkpoint(
                arguments.model_dir,
                arguments.store_dir,
                arguments.device,
                poll=poll,
                method=arguments.method,
                calibration=calibration,
                measurement=measurement,
            )
        except OSError as error:
            raise CheckpointError(f"{error.filename}: {error.strerror}") from error
        size_bytes = store.packed_bytes + store.resident_bytes
        log.info("%s: %s, fingerprint %s", store.path, format_bytes(size_bytes), store.fingerprint)
        if store.quality is not None:
            log.info("quality: %s", store.quality)

    return run_process("quantize", verbose=False, work=work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
