"""A GGUF file as a Source: tensors by Hugging Face's names, config and tokenizer from the file's keys.

Owns which tensor is which, and how they are cut into pieces. `gguf_file` owns the bytes, `gguf_names` and
`gguf_config` what they are called.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import checkpoint as files
from common.checkpoint import EMBEDDING
from common.errors import CheckpointError, ConfigError
from common.families import expected_tensors, validate_config
from common.log import log
from feeder.checkpoints.gguf_config import architecture_of, build_config
from feeder.checkpoints.gguf_file import GgufFile, GgufTensor, block_sizes, decode
from feeder.checkpoints.gguf_names import ROPE_FACTORS, hugging_face_name, unpaired
from feeder.checkpoints.source import Grouped, Part

if TYPE_CHECKING:
    import torch

_PIECE_ELEMENTS = 1 << 22  # whole blocks of every type
_KEPT = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # and what is quantized, as BF16


class GgufSource:
    """A Source. Linears in Q4_0 and Q8_0 come as integers and scales, all else as values."""

    kind = "gguf"

    def __init__(self, paths: Sequence[Path], beside: Path | None = None) -> None:
        """paths: the file, or its parts in order. beside: a directory whose tokenizer files are to be
        used if the file's own cannot be.

        Raises ConfigError or CheckpointError, in one line.
        """
        self._file, self._beside = GgufFile(paths), beside
        path = self._file.path
        self._tensors = _named(self._file)
        self.config = _config(self._file, self._tensors)
        self._pairs = architecture_of(self._file.key).pairs
        self._linear, residents = expected_tensors(self.config)
        shapes = {f"{name}.weight": shape for name, shape in self._linear.items()} | residents
        for name, tensor in self._tensors.items():
            if name not in shapes or tensor.shape != shapes[name]:
                expected = list(shapes[name]) if name in shapes else "none"
                raise CheckpointError(
                    f"{path}: {tensor.name} is {list(tensor.shape)}, expected {expected} by its keys; "
                    "is it a model of another kind?"
                )
        for name in shapes:
            if name not in self._tensors:
                raise CheckpointError(f"{path} lacks {name}, expected it by its keys")

    @property
    def note(self) -> str:
        linear = {f"{name}.weight" for name in self._linear}
        types = Counter(self._tensors[name].type for name in linear)
        return ", ".join(f"{count} weights in {kind}" for kind, count in types.most_common())

    def parts(self) -> list[Part]:
        ordered = sorted(self._tensors.items(), key=lambda entry: (entry[1].file, entry[1].offset))
        return [
            Part(name, t.shape, _KEPT.get(t.type, "BF16"), t.bytes, not t.is_values)
            for name, t in ordered
        ]

    def pieces(self, name: str, device: torch.device) -> Iterator[torch.Tensor | Grouped]:
        import torch

        tensor = self._tensors[name]
        linear = name.removesuffix(".weight") in self._linear
        for raw in self._raw(name, tensor):
            piece = decode(tensor, raw, device)
            if not linear and not tensor.is_values:
                values = piece.values().cpu() if isinstance(piece, Grouped) else piece
                piece = values.to(torch.bfloat16)
            yield piece

    def companions(self, scratch: Path) -> list[Path]:
        from feeder.checkpoints.gguf_tokenizer import save_tokenizer

        try:
            found = save_tokenizer(self._file, scratch)
        except ValueError as error:
            found = [] if self._beside is None else files.companion_files(self._beside)
            instead = (
                "the one beside it is taken"
                if any(path.name in files.VOCABULARIES for path in found)
                else "prompts have to be token ids; or put the file into a directory of its own with the"
                " model's tokenizer.json, and name that"
            )
            log.warning("%s: %s: %s", self._file.path.name, error, instead)
        generation = scratch / "generation_config.json"
        if all(path.name != generation.name for path in found):
            generation.write_text(json.dumps(self._generation()))
            found = [*found, generation]
        return found

    def _generation(self) -> dict[str, Any]:
        """Where a text begins and ends; a chat's turn may end with a token of its own."""
        ends = [self._file.key(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        known = sorted({end for end in ends if type(end) is int})
        settings = {"bos_token_id": self.config.get("bos_token_id"), "eos_token_id": known}
        return {key: value for key, value in settings.items() if value not in (None, [])}

    def _raw(self, name: str, tensor: GgufTensor) -> Iterator[torch.Tensor]:
        """The tensor's bytes in pieces, rows in Hugging Face's order."""
        import torch

        heads = self._heads(name)
        elements, size_bytes = block_sizes(tensor.type)
        step = _PIECE_ELEMENTS // elements * size_bytes
        if heads:  # q and k are small: whole
            whole = torch.empty(tensor.bytes, dtype=torch.uint8)
            files.read_bytes(tensor.file, tensor.offset, whole.numpy().data)
            yield from unpaired(whole.view(tensor.shape[0], -1), heads).view(-1).split(step)
            return
        buffer = torch.empty(min(step, tensor.bytes), dtype=torch.uint8)
        for first in range(0, tensor.bytes, step):
            piece = buffer[: tensor.bytes - first]
            files.read_bytes(tensor.file, tensor.offset + first, piece.numpy().data, step)
            yield piece

    def _heads(self, name: str) -> int:
        """By how many heads the rows of a tensor are reordered; 0 if they are not."""
        if not self._pairs:
            return 0
        stem = name.rpartition(".")[0]
        if stem.endswith("q_proj"):
            return int(self.config["num_attention_heads"])
        return int(self.config["num_key_value_heads"]) if stem.endswith("k_proj") else 0


def read_gguf_config(paths: Sequence[Path]) -> dict[str, Any]:
    """The config of the model in a GGUF file, or its parts in order. No torch.

    Raises ConfigError or CheckpointError.
    """
    file = GgufFile(paths)
    return _config(file, _named(file))


def _named(file: GgufFile) -> dict[str, GgufTensor]:
    found = {}
    for name, tensor in file.tensors.items():
        if name == ROPE_FACTORS:
            continue
        ours = hugging_face_name(name)
        if ours is None:
            architecture_of_file(file)  # says more, if that is why
            raise CheckpointError(
                f"{file.path} has {name!r:.80}, which models of this kind do not; "
                "is it a model of another kind?"
            )
        found[ours] = tensor
    if EMBEDDING not in found:
        raise CheckpointError(f"{file.path} has no token_embd.weight, expected a whole model")
    return found


def architecture_of_file(file: GgufFile) -> None:
    """Raises ConfigError, naming the file, for an architecture that is not known."""
    try:
        architecture_of(file.key)
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from error


def _config(file: GgufFile, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        config = build_config(file.key, shapes, _rope_factors(file))
        validate_config(config)
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from error
    return config


def _rope_factors(file: GgufFile) -> list[float] | None:
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.type != "F32" or math.prod(tensor.shape) > 1 << 16:
        raise CheckpointError(
            f"{file.path}: {ROPE_FACTORS} is {tensor.type} {list(tensor.shape)}, expected F32 of one "
            "number for two columns of a head"
        )
    raw = bytearray(tensor.bytes)
    files.read_bytes(tensor.file, tensor.offset, memoryview(raw))
    return [float(factor) for factor in memoryview(raw).cast("f")]
