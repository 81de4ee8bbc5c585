"""Make a store from a checkpoint: `python -m feeder.quantize MODEL_DIR STORE_DIR`.

Owns the walk over a checkpoint's tensors and the command line. Knows nothing of file formats
(`common.checkpoint`, `common.store_writer`) nor of the arithmetic (`common.int4`, `feeder.methods`).

One tensor at a time, in pieces, in the order of the checkpoint's files: memory holds one piece
and one weight's codes. torch is imported late, so that a signal during its import is obeyed and
a launcher may import this module.
"""

from __future__ import annotations

import math
import select
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.blocks import BLOCK, code_bytes, scale_count
from common.checkpoint import EMBEDDING, HEAD, Checkpoint, companion_files
from common.checkpoint_fingerprint import checkpoint_fingerprint
from common.checksum import as_bytes
from common.config import format_bytes
from common.entry import run_process
from common.errors import CheckpointError, MemoryShortageError, UsageError
from common.log import log
from common.parser import Parser
from common.process import Leash, Terminated
from common.progress import progress as show_progress
from common.qwen2 import expected_tensors, is_tied
from common.store import Store, StoreWriter
from feeder import methods

if TYPE_CHECKING:
    import torch

    from common.int4 import Rule

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
) -> Store:
    """Quantize the checkpoint in `model_dir` into a new store in `store_dir`.

    device: "cpu", "cuda", "cuda:1", or "auto" for the GPU if there is one. progress: show it
    on stderr. poll: called between pieces; whatever it raises stops the work and leaves nothing.
    method: one of `feeder.methods`.
    Raises ConfigError, CheckpointError, StoreError, UsageError or MemoryShortageError.
    """
    rule = methods.rule(method)
    checkpoint = Checkpoint.open(model_dir)
    _, residents = expected_tensors(checkpoint.config)
    writer = StoreWriter(
        store_dir,
        checkpoint.config,
        {name: checkpoint.places[name].spec.dtype for name in residents},
        source_fingerprint=checkpoint_fingerprint(model_dir),
        copies=companion_files(checkpoint.path),
        method=method,
    )
    places = sorted(checkpoint.places.values(), key=lambda place: (place.file, place.offset))
    chosen = choose_device(device)
    total_bytes = sum(place.spec.bytes for place in places)
    with writer, show_progress(total_bytes, "quantizing", enabled=progress) as bar:
        for place in places:
            name = place.spec.name
            pieces = _watched(checkpoint, name, poll, bar.update)
            if name in residents:
                writer.add_resident_pieces(name, _finite(name, pieces))
            elif name == HEAD and is_tied(checkpoint.config):
                _require_equal(pieces, checkpoint.pieces(EMBEDDING))
            else:
                packed = _quantize(name, pieces, place.spec.shape, chosen, rule)
                writer.add_weight(name.removesuffix(".weight"), place.spec.shape, *packed)
        poll()
        writer.commit()
    return Store.open(store_dir)


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
    checkpoint: Checkpoint, name: str, poll: Callable[[], None], count: Callable[[int], object]
) -> Iterator[torch.Tensor]:
    """The pieces of a tensor; polls before each, counts its bytes when it has been worked on."""
    for piece in checkpoint.pieces(name):
        poll()
        yield piece
        count(piece.nbytes)


def _finite(name: str, pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same pieces; CheckpointError if a value is NaN or Inf."""
    for piece in pieces:
        extremes = piece.aminmax()  # both are NaN if any value is
        if not math.isfinite(extremes.min) or not math.isfinite(extremes.max):
            raise CheckpointError(f"{name}: found NaN or Inf, expected finite values")
        yield piece


def _require_equal(head: Iterator[torch.Tensor], embedding: Iterator[torch.Tensor]) -> None:
    for one, other in zip(head, embedding, strict=True):
        if one.dtype != other.dtype or as_bytes(one) != as_bytes(other):
            raise CheckpointError(
                "lm_head.weight differs from the embedding, although the config ties them; "
                "set tie_word_embeddings to false in config.json if both are meant"
            )


def _quantize(
    name: str,
    pieces: Iterator[torch.Tensor],
    shape: tuple[int, ...],
    device: torch.device,
    rule: Rule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, on the CPU, of a weight that comes in pieces of whole blocks."""
    import torch

    from common import int4

    elements = shape[0] * shape[1]
    codes = torch.empty(code_bytes(elements), dtype=torch.uint8)
    scales = torch.empty(scale_count(elements), dtype=torch.bfloat16)
    first = 0
    for piece in pieces:
        try:
            piece_codes, piece_scales = int4.quantize(piece.to(device), rule)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from error
        except torch.OutOfMemoryError as error:
            raise MemoryShortageError(
                f"the GPU has no room for {piece.nbytes >> 20} MiB of {name}; use --device cpu"
            ) from error
        codes[first // 2 :][: piece_codes.numel()] = piece_codes.cpu()
        scales[first // BLOCK :][: piece_scales.numel()] = piece_scales.cpu()
        first += piece.numel()
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


def make_parser() -> Parser:
    """The parser of this command."""
    parser = Parser(
        "quantize", examples=_EXAMPLES, usage="%(prog)s MODEL_DIR STORE_DIR [FLAGS]",
        prog="python -m feeder.quantize", description="Makes an INT4 store from a checkpoint.",
    )  # fmt: skip
    parser.add_argument("model_dir", type=Path, help="a Qwen2 checkpoint in safetensors")
    parser.add_argument("store_dir", type=Path, help="the store to make; must not exist")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:INDEX or cpu")
    parser.add_argument(
        "--method",
        default=methods.DEFAULT,
        choices=tuple(methods.METHODS),
        help="; ".join(f"{name}: {what}" for name, what in methods.METHODS.items())
        + f"; default: {methods.DEFAULT}",
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the command line `argv`; returns the exit code."""

    def work(leash: Leash) -> None:
        poll = _watch_for_the_end(leash)
        try:
            store = quantize_checkpoint(
                arguments.model_dir,
                arguments.store_dir,
                arguments.device,
                poll=poll,
                method=arguments.method,
            )
        except OSError as error:
            raise CheckpointError(f"{error.filename}: {error.strerror}") from error
        size_bytes = store.packed_bytes + store.resident_bytes
        log.info("%s: %s, fingerprint %s", store.path, format_bytes(size_bytes), store.fingerprint)

    arguments = make_parser().parse_args(argv)
    return run_process("quantize", verbose=False, work=work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
