"""Make a store of random weights in the shape of a real model, for measurements.

    python -m feeder.random_store qwen2.5-32b STORE_DIR

Owns how random weights are drawn: straight as INT4, fast, and so that activations stay finite.
The text that such a model makes is noise, but every byte moves as it would for the real one.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from common.arguments import Parser
from common.blocks import code_bytes, packed_bytes, scale_count
from common.checkpoint import companion_files
from common.config import format_bytes
from common.entry import run_process
from common.errors import ConfigError
from common.families import expected_tensors, validate_config
from common.log import log
from common.process import Leash, raise_on_termination
from common.progress import progress as show_progress
from common.shapes import SHAPES
from common.store import Store, StoreWriter
from common.strict_json import read_object

_POOL_BYTES = 256 << 20
_CODE_DEVIATION = 4.6  # of uniform codes in -8...7
_EMBEDDING_PIECE = 1 << 24  # elements


def make_random_store(
    config: dict[str, Any],
    store_dir: Path | str,
    seed: int = 0,
    tokenizer_dir: Path | None = None,
    progress: bool = True,
) -> Store:
    """Write a store of random weights for `config`; the same seed gives the same store.

    tokenizer_dir: a directory whose tokenizer files go along. Raises ConfigError or StoreError.
    """
    validate_config(config)
    linear, residents = expected_tensors(config)
    writer = StoreWriter(
        store_dir,
        config,
        dict.fromkeys(residents, "BF16"),
        copies=companion_files(tokenizer_dir) if tokenizer_dir else (),
    )
    pool = _random_pool(seed)
    total_bytes = sum(packed_bytes(math.prod(shape)) for shape in linear.values())
    total_bytes += sum(2 * math.prod(shape) for shape in residents.values())
    workers = len(os.sched_getaffinity(0))
    with (
        writer,
        show_progress(total_bytes, "writing random weights", enabled=progress) as bar,
        ThreadPoolExecutor(workers, thread_name_prefix="random") as executor,
    ):

        def write_weight(numbered: tuple[int, str]) -> None:
            number, name = numbered
            generator = torch.Generator().manual_seed(seed + number)
            codes, scales = _random_weight(pool, linear[name], generator)
            writer.add_weight(name, linear[name], codes, scales)
            bar.update(codes.nbytes + scales.nbytes)

        written = executor.map(write_weight, enumerate(linear, start=1))
        try:
            for name, shape in residents.items():
                writer.add_resident_pieces(name, _random_resident(name, shape, seed))
                bar.update(2 * math.prod(shape))
            for _ in written:  # raises what a thread raised
                pass
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
        writer.commit()
    return Store.open(store_dir)


def _random_pool(seed: int) -> torch.Tensor:
    """Random bytes, uint8 [_POOL_BYTES], that all weights' codes are cut from."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.empty(_POOL_BYTES // 8, dtype=torch.int64)
    return words.random_(-(1 << 63), None, generator=generator).view(torch.uint8)


def _random_weight(
    pool: torch.Tensor, shape: tuple[int, int], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a weight (N, K) whose values deviate by 1 / sqrt(K).

    A product with it then is as large as what goes in. The codes are a piece of the pool, or
    all of it over and over, that begins at a random place.
    """
    elements = math.prod(shape)
    size = code_bytes(elements)
    start = int(torch.randint(_POOL_BYTES, (1,), generator=generator))
    pieces = [pool[start : start + size]]
    while (rest := size - sum(piece.numel() for piece in pieces)) > 0:
        pieces.append(pool[:rest])
    codes = torch.cat(pieces)
    if elements % 2:
        codes[-1] &= 0xF0  # the tail is padded with code 0
    variation = torch.rand(scale_count(elements), generator=generator) * 0.2 + 0.9
    scales = variation / (_CODE_DEVIATION * math.sqrt(shape[1]))
    return codes, scales.to(torch.bfloat16)


def _random_resident(name: str, shape: tuple[int, ...], seed: int) -> Iterator[torch.Tensor]:
    """Pieces, bf16, of a resident: norms are 1, biases small, the embedding's deviation 0.02."""
    elements = math.prod(shape)
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, elements, _EMBEDDING_PIECE):
        count = min(_EMBEDDING_PIECE, elements - first)
        if name.endswith("norm.weight"):
            yield torch.ones(count, dtype=torch.bfloat16)
        else:
            yield (torch.randn(count, generator=generator) * 0.02).to(torch.bfloat16)


def _config(shape_or_config: str, layers: int | None) -> dict[str, Any]:
    """The config that the command line names: a known shape, a config.json or its directory."""
    if shape_or_config in SHAPES:
        config = dict(SHAPES[shape_or_config])
    else:
        path = Path(shape_or_config)
        try:
            config = read_object(path / "config.json" if path.is_dir() else path)
        except ValueError as error:
            raise ConfigError(
                f"{path}: {error}; expected a config.json or one of {', '.join(SHAPES)}"
            ) from error
    if layers is not None:
        config["num_hidden_layers"] = layers
        config.pop("layer_types", None)  # a list of one entry a layer; the default is full
    return config


def main(argv: list[str]) -> int:
    """Run the command line `argv`; returns the exit code."""
    parser = Parser(
        prog="python -m feeder.random_store", description="Makes a store of random weights."
    )
    parser.add_argument("shape", help=f"a config.json, or one of {', '.join(SHAPES)}")
    parser.add_argument("store_dir", type=Path, help="the store to make; must not exist")
    parser.add_argument("--layers", type=int, help="make only so many layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="copy the tokenizer files from here")

    def work(leash: Leash) -> None:
        raise_on_termination()
        config = _config(arguments.shape, arguments.layers)
        store = make_random_store(config, arguments.store_dir, arguments.seed, arguments.tokenizer)
        size_bytes = store.packed_bytes + store.resident_bytes
        log.info("%s: %s, fingerprint %s", store.path, format_bytes(size_bytes), store.fingerprint)

    arguments = parser.parse_args(argv)
    return run_process("random_store", verbose=False, work=work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
