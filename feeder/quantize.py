"""Make a store from a checkpoint: `python -m feeder.quantize MODEL_DIR STORE_DIR`.

Owns the walk over a checkpoint's tensors and the command line. Knows nothing of file formats
(`feeder.checkpoints`, `common.store_writer`) nor of the arithmetic (`feeder.convert`, `feeder.methods`).

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
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from common.arguments import Parser
from common.blocks import BLOCK, code_bytes, scale_count
from common.checkpoint import EMBEDDING, HEAD
from common.checkpoint_fingerprint import checkpoint_fingerprint
from common.checksum import as_bytes
from common.config import format_bytes
from common.entry import run_process
from common.errors import CheckpointError, MemoryShortageError, UsageError
from common.log import log
from common.process import Leash, Terminated
from common.progress import progress as show_progress
from common.qwen2 import expected_tensors, is_tied
from common.store import Store, StoreWriter
from feeder import methods
from feeder.checkpoints.recognize import open_source

if TYPE_CHECKING:
    import torch

    from common.int4 import Rule
    from feeder.checkpoints.source import Grouped, Part, Source
    from feeder.convert import Tally

__all__ = ["checkpoint_fingerprint", "main", "quantize_checkpoint"]


def quantize_checkpoint(
    model_dir: Path | str,
    store_dir: Path | str,
    device: str = "auto",
    progress: bool = True,
    poll: Callable[[], None] = lambda: None,
    method: str = methods.DEFAULT,
) -> Store:
    """Quantize the checkpoint at `model_dir`, of any kind that there is, into a new store in `store_dir`.

    device: "cpu", "cuda", "cuda:1", or "auto" for the GPU if there is one. progress: show it
    on stderr. poll: called between pieces; whatever it raises stops the work and leaves nothing.
    method: one of `feeder.methods`; what a ready-made checkpoint has quantized is kept where it can be.
    Raises ConfigError, CheckpointError, StoreError, UsageError or MemoryShortageError.
    """
    from feeder.convert import Tally

    rule = methods.rule(method)
    source = open_source(Path(model_dir))
    parts = source.parts()
    _, residents = expected_tensors(source.config)
    chosen = choose_device(device)
    tally = Tally()
    if source.note:
        log.info(
            "%s: %s checkpoint: %s; what a store cannot hold of it is quantized again by %s",
            model_dir, source.kind, source.note, method,
        )  # fmt: skip
    with ExitStack() as stack:
        scratch = stack.enter_context(TemporaryDirectory(prefix="weight-feeder-"))
        writer = StoreWriter(
            store_dir,
            source.config,
            {part.name: part.dtype for part in parts if part.name in residents},
            source_fingerprint=checkpoint_fingerprint(model_dir),
            copies=source.companions(Path(scratch)),
            method=method,
            source_format=source.kind,
        )
        stack.enter_context(writer)
        total_bytes = sum(part.bytes for part in parts)
        bar = stack.enter_context(show_progress(total_bytes, "quantizing", enabled=progress))
        for part in parts:
            pieces = _watched(source, part, chosen, poll, bar.update)
            if part.name in residents:
                writer.add_resident_pieces(part.name, _finite(part.name, pieces))
            elif part.name == HEAD and is_tied(source.config):
                _require_equal(pieces, source.pieces(EMBEDDING, chosen))
            else:
                packed = _quantize(part, pieces, chosen, rule, tally)
                writer.add_weight(part.name.removesuffix(".weight"), part.shape, *packed)
        poll()
        writer.commit()
    if tally.blocks:
        log.info("%s", tally.said(source.kind, method))
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


def main(argv: list[str]) -> int:
    """Run the command line `argv`; returns the exit code."""
    parser = Parser(
        prog="python -m feeder.quantize", description="Makes an INT4 store from a checkpoint."
    )
    parser.add_argument(
        "model_dir", type=Path,
        help="a checkpoint in safetensors (bf16, fp16, fp32, GPTQ, AWQ, compressed-tensors) or a GGUF file",
    )  # fmt: skip
    parser.add_argument("store_dir", type=Path, help="the store to make; must not exist")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:INDEX or cpu")
    parser.add_argument(
        "--method",
        default=methods.DEFAULT,
        choices=tuple(methods.METHODS),
        help="; ".join(f"{name}: {what}" for name, what in methods.METHODS.items())
        + f"; default: {methods.DEFAULT}",
    )

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

    arguments = parser.parse_args(argv)
    return run_process("quantize", verbose=False, work=work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
