"""A small random store, written tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common import int4
from common.families import expected_tensors
from common.store import StoreWriter, checksum

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 12,
    "intermediate_size": 21,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 33,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}
LINEAR, RESIDENTS = expected_tensors(CONFIG)
DTYPES = {name: ("F32" if "norm" in name else "BF16") for name in RESIDENTS}


def weight(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(hash_of(name))
    return int4.quantize(torch.randn(LINEAR[name], generator=generator))


def resident(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash_of(name))
    dtype = torch.float32 if DTYPES[name] == "F32" else torch.bfloat16
    return torch.randn(RESIDENTS[name], generator=generator).to(dtype)


def hash_of(name: str) -> int:
    return int(checksum(name.encode())[:8], 16)


def add_everything(writer: StoreWriter) -> None:
    for name, shape in LINEAR.items():
        writer.add_weight(name, shape, *weight(name))
    for name in RESIDENTS:
        writer.add_resident(name, resident(name))


def write_store(path: Path, **options: Any) -> Path:
    with StoreWriter(path, CONFIG, DTYPES, **options) as writer:
        add_everything(writer)
        writer.commit()
    return path
