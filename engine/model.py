"""Builds the model without ever holding its weights: residents from the store, Linears fed by slots."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from common.checkpoint import EMBEDDING
from common.errors import ConfigError, StoreError
from common.families import family_of
from common.hollow import hollow
from common.memory import Memory
from common.store import Store
from common.store_index import CONFIG_FILE
from engine.client import WeightClient
from engine.embedding import host_table
from engine.linear import FedLinear, Group
from engine.packed import Products

GENERATION_FILE = "generation_config.json"
ATTENTION = ("auto", "flash_attention_2", "sdpa", "eager")


def choose_attention(asked: str, device: torch.device, dtype: torch.dtype) -> str:
    """The attention implementation, by transformers' names. ConfigError if ``asked`` cannot run."""
    reason = ""
    if importlib.util.find_spec("flash_attn") is None:
        reason = "the package flash-attn is not installed"
    elif device.type != "cuda":
        reason = f"it does not run on {device.type}"
    elif dtype not in (torch.bfloat16, torch.float16):
        reason = f"it does not take {dtype}"
    if asked == "auto":
        return "sdpa" if reason else "flash_attention_2"
    if asked == "flash_attention_2" and reason:
        raise ConfigError(f"attention flash_attention_2 cannot be used: {reason}: use auto or sdpa")
    return asked


def build_model(
    store: Store,
    client: WeightClient,
    memory: Memory,
    dtype: torch.dtype,
    attention: str = "auto",
    first_weight: int = 0,
) -> PreTrainedModel:
    """The model on ``memory.device``, in which every Linear that the store holds is a FedLinear.

    ``first_weight``: by what index the feeder knows the store's first weight.
    Raises ConfigError if transformers refuses the config, StoreError if store and model disagree,
    StoreCorruptError if a resident is damaged.
    """
    device = memory.device
    if device.type == "cuda":
        # cuDNN's attention builds a plan for every new length of the KV cache: 25 ms for each token,
        # measured on an H100. docs/decisions/0005-no-cudnn-attention.md
        torch.backends.cuda.enable_cudnn_sdp(False)
    attention = choose_attention(attention, device, dtype)
    model = hollow(store.config, store.path / CONFIG_FILE, device, attention, dtype)
    residents = {}
    for entry in store.residents:
        tensor = store.read_resident(entry)
        store.check_resident(entry, tensor)
        if entry.name == EMBEDDING and not store.tied and device.type == "cuda":
            residents[entry.name] = host_table(tensor, dtype, memory)
        else:
            residents[entry.name] = tensor.to(device=device, dtype=dtype)
    _feed_linears(model, store, client, dtype, residents, Products(device, dtype), first_weight)
    _assign(model, residents)
    if store.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    missing = [n for n, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta]
    if missing:
        raise StoreError(f"store {store.path} lacks {missing[0]} (and {len(missing) - 1} more)")
    model.config.dtype = dtype
    if (store.path / GENERATION_FILE).is_file():
        model.generation_config = _generation_config(store)
    return model.eval().requires_grad_(False)


def _generation_config(store: Store) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(store.path, local_files_only=True)
    except (OSError, TypeError, ValueError) as error:
        raise StoreError(
            f"{store.path / GENERATION_FILE} cannot be used: {error}: mend it, or remove it"
        ) from error


def _feed_linears(
    model: nn.Module,
    store: Store,
    client: WeightClient,
    dtype: torch.dtype,
    residents: dict[str, torch.Tensor],
    products: Products,
    first_weight: int,
) -> None:
    for index, entry in enumerate(store.weights, first_weight):
        parent_name, _, name = entry.name.rpartition(".")
        try:
            linear = model.get_submodule(entry.name)
        except AttributeError:
            raise StoreError(f"store {store.path} has {entry.name}, the model has not") from None
        if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != entry.shape:
            raise StoreError(f"{entry.name} of store {store.path} does not fit the model's")
        bias = residents.pop(f"{entry.name}.bias", None)
        if (bias is None) != (linear.bias is None):
            raise StoreError(
                f"{entry.name} of store {store.path}: the bias does not fit the model's"
            )
        fed = FedLinear(client, index, entry.shape, dtype, bias, products)
        setattr(model.get_submodule(parent_name), name, fed)
    for layer in model.get_submodule("model.layers").children():
        for names in family_of(store.config).groups:
            members = [layer.get_submodule(name) for name in names]
            group = [member for member in members if isinstance(member, FedLinear)]
            if len(group) == len(names):
                Group(client, products, group)


def _assign(model: nn.Module, residents: dict[str, torch.Tensor]) -> None:
    for name, tensor in residents.items():
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, leaf, nn.Parameter(tensor, requires_grad=False))
