"""Small random checkpoints, saved by transformers itself, and ways to damage them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

from common.families import expected_tensors
from common.safetensors_file import TensorSpec, layout
from tests.families import theirs


def make_checkpoint(
    path: Path,
    *,
    hidden: int = 96,
    intermediate: int = 200,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 320,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    shard_size: str | None = None,
    seed: int = 0,
) -> Path:
    """Save a random Qwen2ForCausalLM in `path`; returns `path`.

    The defaults are grouped heads and sizes that are no multiple of 128. Biases and norms are
    random too, so that one that is lost or mixed up shows. shard_size: such as "100KB".
    """
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
    )
    return save_random(path, config, dtype=dtype, shard_size=shard_size, seed=seed)


def make_model(path: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Save a random model of any family's config.json in `path`; returns `path`."""
    return save_random(path, theirs(config), seed=seed)


def save_random(
    path: Path,
    config: Any,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard_size: str | None = None,
    seed: int = 0,
) -> Path:
    """Save a random model of a transformers config in `path`; returns `path`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                centre = 1.0 if name.endswith("norm.weight") else 0.0
                torch.nn.init.normal_(parameter, centre, 0.1)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1)
    sharding = {} if shard_size is None else {"max_shard_size": shard_size}
    model.to(dtype).save_pretrained(path, **sharding)
    return path


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Let `edit` change the tensors of a checkpoint of a single file."""
    file = path / "model.safetensors"
    # Cloned: load_file may map the file that is about to be written.
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(path: Path, **changes: Any) -> None:
    """Set keys of a checkpoint's config.json; None removes one."""
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    file.write_text(json.dumps(kept))


def make_hollow_checkpoint(path: Path, *, dtype: str = "F32", **sizes: int) -> Path:
    """Make a checkpoint of zeros that takes hardly any disk: its file is one large hole.

    dtype: as safetensors spells it. sizes: config keys, such as intermediate_size.
    """
    config = {
        "model_type": "qwen2",
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 128,
        "tie_word_embeddings": True,
        **sizes,
    }
    linear, residents = expected_tensors(config)
    shapes = {f"{name}.weight": shape for name, shape in linear.items()} | residents
    start, header = layout([TensorSpec(name, dtype, shape) for name, shape in shapes.items()])
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    with (path / "model.safetensors").open("wb") as file:
        file.write(start)
        file.truncate(header.file_bytes)
    return path
