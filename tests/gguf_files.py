"""GGUF files of small random models, written by the gguf package: its names, its quantizers, its writer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from tests.checkpoints import load_tensors

Quantize = Callable[[str, np.ndarray], tuple[np.ndarray, Type]]


def all_as(kind: Type) -> Quantize:
    """Matrices as `kind`, vectors as F32, as llama.cpp's converter does."""

    def quantize(name: str, values: np.ndarray) -> tuple[np.ndarray, Type]:
        if values.ndim == 1:
            return values, Type.F32
        return gguf.quants.quantize(values, kind), kind

    return quantize


def write_gguf(
    path: Path,
    checkpoint: Path,
    quantize: Quantize,
    *,
    architecture: str = "qwen2",
    keys: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    tokenizer: Path | None = None,
    pre: str = "qwen2",
    part_tensors: int = 0,
) -> dict[str, torch.Tensor]:
    """Write the checkpoint as a GGUF file; returns the values of its tensors by their Hugging Face names, as
    the package dequantizes them. pre: how the tokenizer splits text. part_tensors: how many each part has, if
    the file is to be in parts."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=part_tensors)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
    for key, value in (keys or {}).items():
        _add(writer, key, value)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer, pre)
    arch = gguf.MODEL_ARCH[architecture.upper()]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    values = {}
    for name, tensor in load_tensors(checkpoint).items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None
        raw, kind = quantize(name, _permuted(name, tensor.float().numpy(), config, architecture))
        writer.add_tensor(theirs, raw, raw_dtype=kind)
        dequantized = gguf.quants.dequantize(raw.view(np.uint8), kind).reshape(tensor.shape)
        values[name] = torch.from_numpy(np.array(dequantized, dtype=np.float32))
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def _permuted(
    name: str, values: np.ndarray, config: Mapping[str, Any], architecture: str
) -> np.ndarray:
    """Rows of q and k as llama.cpp wants them for the architecture llama: a head's row i of the first half,
    then row i of the second, then row i + 1 of the first."""
    if architecture != "llama" or not ("q_proj" in name or "k_proj" in name):
        return values
    heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
    size = len(values) // heads
    order = [
        head * size + half * (size // 2) + i
        for head in range(heads)
        for i in range(size // 2)
        for half in range(2)
    ]
    return np.ascontiguousarray(values[order])


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, directory: Path, pre: str) -> None:
    """A byte-level BPE tokenizer, from its tokenizer.json."""
    data = json.loads((directory / "tokenizer.json").read_text())
    tokens = {index: token for token, index in data["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in data["added_tokens"]}
    tokens |= special
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    ids = {token: index for index, token in tokens.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens[index] for index in range(len(tokens))])
    kinds = [
        gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL
        for i in range(len(tokens))
    ]
    writer.add_token_types(kinds)
    merges = data["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(ids[settings["eos_token"]])
    writer.add_chat_template((directory / "chat_template.jinja").read_text())
