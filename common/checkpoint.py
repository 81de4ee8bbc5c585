"""A Hugging Face checkpoint: finding its tensors, checking them, reading them piece by piece.

Owns what a checkpoint directory looks like and every way in which it can be wrong. Knows nothing
of quantizing. Opening reads only headers; only reading tensors needs torch.

Tensors are read, not mapped: memory stays as small as a piece is, and a file that shrinks
meanwhile is an error, not a signal.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from common.errors import CheckpointError, ConfigError
from common.families import expected_tensors, is_tied, validate_config
from common.inside import leads_outside
from common.safetensors_file import DTYPE_BYTES, SafetensorsError, TensorSpec, read_header
from common.store_index import CONFIG_FILE, RESIDENT_DTYPES
from common.strict_json import read_object

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
PIECE_ELEMENTS = 1 << 23  # whole blocks; 16 MiB in bf16

# How torch calls what checkpoints hold: values, and in quantized ones packed codes and shapes.
TORCH_DTYPES = RESIDENT_DTYPES | {"I32": "int32", "I64": "int64"}

_PACKED = ("qweight", "weight_packed")  # what quantizers have in place of a weight
_FILE_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}\.safetensors")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # a tokenizer has one of these
_COMPANIONS = (
    *("generation_config.json", "tokenizer*.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
)


@dataclass(frozen=True)
class TensorPlace:
    """A tensor of a checkpoint: what it is, and where its bytes begin in which file."""

    spec: TensorSpec
    file: Path
    offset: int


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its config, and exactly the tensors that the config expects.

    A tied checkpoint that carries an lm_head all the same has it here too.
    """

    path: Path
    config: dict[str, Any]
    places: dict[str, TensorPlace]

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Open the checkpoint in the directory `path` and check all that headers can tell.

        Raises ConfigError or CheckpointError, in one line.
        """
        path = Path(path)
        config = read_config(path)
        if config.get("quantization_config") is not None:
            raise CheckpointError(
                f"{path} is already quantized (its config has a quantization_config), expected an "
                "original in bf16, fp16 or fp32"
            )
        return cls(path, config, expected_places(path, config, read_places(path)))

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Read the tensor `name` as flat pieces of `PIECE_ELEMENTS`, the last one shorter.

        Each has the tensor's own dtype, lies on the CPU, and is good until the next one is asked
        for, since they share memory: fresh pages for each would take longer than the reading.
        Raises CheckpointError.
        """
        return read_pieces(self.places[name])


def read_pieces(place: TensorPlace) -> Iterator[torch.Tensor]:
    """Read a tensor of any dtype that torch has, as `Checkpoint.pieces` does."""
    import torch

    dtype = getattr(torch, TORCH_DTYPES[place.spec.dtype])
    step = min(PIECE_ELEMENTS * DTYPE_BYTES[place.spec.dtype], place.spec.bytes)
    buffer = torch.empty(step, dtype=torch.uint8)
    for first in range(0, place.spec.bytes, step):
        piece = buffer[: place.spec.bytes - first]
        read_bytes(place.file, place.offset + first, piece.numpy().data, step)
        yield piece.view(dtype)


def read_bytes(file: Path, offset: int, buffer: memoryview, ahead_bytes: int = 0) -> None:
    """Fill `buffer` from `offset`, and have the kernel read ahead. Raises CheckpointError."""
    try:
        with file.open("rb", buffering=0) as opened:
            _read_into(opened.fileno(), buffer, offset, ahead_bytes)
    except EOFError:
        raise CheckpointError(f"{file} became shorter while it was read") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error


def read_config(path: Path) -> dict[str, Any]:
    """The checkpoint's config.json, validated. Raises ConfigError or CheckpointError."""
    if not path.is_dir():
        found = "is not a directory" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {found}, expected a checkpoint directory or a .gguf file")
    try:
        config = read_object(require_inside(path, path / CONFIG_FILE))
    except ValueError as error:
        raise ConfigError(f"{path / CONFIG_FILE}: {error}; expected a model's config") from error
    try:
        validate_config(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config


def weight_files(path: Path) -> list[Path]:
    """The checkpoint's safetensors files, sorted. Raises CheckpointError if it has none."""
    if (path / SINGLE_FILE).exists():
        return [require_inside(path, path / SINGLE_FILE)]
    if (path / INDEX_FILE).exists():
        return [
            require_inside(path, path / name)
            for name in sorted(set(_read_weight_map(path).values()))
        ]
    if any(path.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{path} has pickled weights only (pytorch_model.bin), expected safetensors; convert "
            "it: load it with transformers and save_pretrained(..., safe_serialization=True)"
        )
    raise CheckpointError(f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}, expected one")


def companion_files(path: Path) -> list[Path]:
    """The tokenizer and generation files that go along with the weights, sorted by name.

    Raises CheckpointError for one that is a link to elsewhere: it would be copied into the store.
    """
    found = {file for pattern in _COMPANIONS for file in path.glob(pattern) if file.is_file()}
    return sorted(require_inside(path, file) for file in found if file.name != INDEX_FILE)


def require_inside(path: Path, file: Path) -> Path:
    """`file`. CheckpointError if it is a link that leads out of the checkpoint's directory `path`."""
    real = leads_outside(path, file)
    if real is not None:
        raise CheckpointError(
            f"{file} is a link to {real}, outside the checkpoint; "
            "put the file itself there, if it is meant"
        )
    return file


def _read_weight_map(path: Path) -> dict[str, str]:
    """Which file each tensor lies in; empty for a checkpoint of a single file."""
    if (path / SINGLE_FILE).exists() or not (path / INDEX_FILE).exists():
        return {}
    try:
        weight_map = read_object(require_inside(path, path / INDEX_FILE)).get("weight_map")
    except ValueError as error:
        raise CheckpointError(f"{path / INDEX_FILE}: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX_FILE}: no weight_map, expected tensor: file pairs")
    for file in weight_map.values():
        # A plain name: an index is no reason to read files elsewhere.
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise CheckpointError(
                f"{path / INDEX_FILE}: found the file {file!r:.80}, expected a name such as "
                "model-00001-of-00002.safetensors"
            )
    return weight_map


def read_places(path: Path) -> dict[str, TensorPlace]:
    """All tensors that the files of a checkpoint directory have. Raises CheckpointError."""
    weight_map = _read_weight_map(path)
    places: dict[str, TensorPlace] = {}
    for file in weight_files(path):
        places |= _read_places(file, weight_map)
    for name, file_name in weight_map.items():
        if name not in places:
            raise CheckpointError(
                f"{path / file_name} lacks {name!r:.120}, which {INDEX_FILE} says it holds; "
                "fetch the checkpoint again"
            )
    return places


def _read_places(file: Path, weight_map: dict[str, str]) -> dict[str, TensorPlace]:
    try:
        header = read_header(file)
    except SafetensorsError as error:
        raise CheckpointError(f"{error}; fetch the checkpoint again") from error
    return {
        name: TensorPlace(spec, file, header.offsets[name])
        for name, spec in header.tensors.items()
        if weight_map.get(name, file.name) == file.name
    }


def expected_places(
    path: Path,
    config: dict[str, Any],
    places: dict[str, TensorPlace],
    elsewhere: Collection[str] = (),
) -> dict[str, TensorPlace]:
    """Match the files against the config; returns the places of what it expects.

    elsewhere: names of Linears, without ".weight", whose weights come in another form.
    Raises CheckpointError.
    """
    linear, residents = expected_tensors(config)
    here = {f"{name}.weight": linear[name] for name in linear if name not in elsewhere}
    shapes: dict[str, tuple[int, ...]] = here | residents
    for name in shapes:
        if name not in places:
            _refuse_lacking(path, name, places)
    if is_tied(config) and HEAD in places:
        shapes[HEAD] = shapes[EMBEDDING]
    for name, place in places.items():
        if name.endswith("rotary_emb.inv_freq"):  # a buffer that old versions saved
            continue
        if name not in shapes:
            raise CheckpointError(
                f"{place.file} has {name!r:.120}, which a {config['model_type']} of this config does not; "
                "is it a checkpoint of another kind?"
            )
        if place.spec.shape != shapes[name]:
            raise CheckpointError(
                f"{place.file}: {name} has the shape {list(place.spec.shape)}, expected "
                f"{list(shapes[name])} by the config"
            )
        if place.spec.dtype not in RESIDENT_DTYPES:
            raise CheckpointError(
                f"{place.file}: {name} is {place.spec.dtype}, expected one of "
                f"{', '.join(RESIDENT_DTYPES)}"
            )
    return {name: places[name] for name in shapes}


def _refuse_lacking(path: Path, name: str, places: Collection[str]) -> NoReturn:
    for packed in _PACKED:
        found = name.removesuffix("weight") + packed
        if found in places:
            raise CheckpointError(
                f"{path} has {found} where its config expects {name}: what says how it is quantized is "
                f"missing, or is another quantizer's; fetch its {CONFIG_FILE}, and "
                "quantize_config.json, again"
            )
    raise CheckpointError(
        f"{path} lacks {name}, which its config expects; fetch the checkpoint again"
    )


def _read_into(fd: int, buffer: memoryview, offset: int, ahead_bytes: int) -> None:
    """Fill `buffer` from `offset`, and have the kernel read ahead. EOFError if the file ends."""
    os.posix_fadvise(fd, offset + len(buffer), ahead_bytes, os.POSIX_FADV_WILLNEED)
    while buffer:
        count = os.preadv(fd, [buffer], offset)
        if count == 0:
            raise EOFError
        buffer, offset = buffer[count:], offset + count
