"""A model and its quantized twin on the same text, a layer at a time, each on its own hidden states.

Owns the walk through the layers, so that no more of each model is in
memory than one layer, or the embedding, or the head. Knows nothing of text or of what is made of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from common import int4
from common.checkpoint import EMBEDDING, HEAD, Checkpoint
from common.store import Store

# A tensor of a model by its checkpoint name, in the dtype and on the device of the measurement.
Tensors = Callable[[str], torch.Tensor]
_TOKENS_AT_ONCE = 2048  # through a layer
_LOGITS_AT_ONCE = 1 << 25  # 128 MiB in fp32


@dataclass(frozen=True)
class LayerError:
    """How far a layer's output, and its weights, are from the original's; Frobenius, relative."""

    hidden: float
    weights: float


def of_checkpoint(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Tensors:
    """The tensors of a checkpoint."""

    def read(name: str) -> torch.Tensor:
        found = torch.empty(checkpoint.places[name].spec.shape, dtype=dtype, device=device)
        flat, first = found.view(-1), 0
        for piece in checkpoint.pieces(name):
            flat[first : first + piece.numel()] = piece.to(device)
            first += piece.numel()
        return found

    return read


def of_store(store: Store, device: torch.device, dtype: torch.dtype) -> Tensors:
    """The tensors of a store, its weights dequantized by the reference; all are checked."""
    weights = {f"{entry.name}.weight": entry for entry in store.weights}
    residents = {entry.name: entry for entry in store.residents}

    def read(name: str) -> torch.Tensor:
        if name in residents:
            tensor = store.read_resident(residents[name])
            store.check_resident(residents[name], tensor)
            return tensor.to(device=device, dtype=dtype)
        codes, scales = store.read_weight(weights[name])
        store.check(weights[name], codes, scales)
        shape = weights[name].shape
        return int4.dequantize(codes.to(device), scales.to(device), shape, dtype)

    return read


class Pair:
    """Two models of one architecture, and where each has come to with its hidden states.

    ``config_dir``: a directory with their config.json. ``models``: the original, the quantized.
    ``ids``: tokens [rows, length], on the device; each row is a text of its own. Attention is
    causal, without a window, so what follows a text's end does not reach it.
    """

    def __init__(
        self, config_dir: Path, models: tuple[Tensors, Tensors], ids: torch.Tensor
    ) -> None:
        config = AutoConfig.from_pretrained(config_dir, local_files_only=True)
        config._attn_implementation = "sdpa"  # given no mask, it is causal
        with torch.device("meta"):
            skeleton: Any = AutoModelForCausalLM.from_config(config)
        self._layers, self._norm = skeleton.model.layers, skeleton.model.norm
        self._models = models
        self._head = EMBEDDING if config.tie_word_embeddings else HEAD
        with torch.device(ids.device):  # its frequencies are in no checkpoint, but computed
            self._rotary = type(skeleton.model.rotary_emb)(config)
        self._positions = torch.arange(ids.shape[1], device=ids.device)[None]
        self._states = [nn.functional.embedding(ids, model(EMBEDDING)) for model in models]

    @torch.inference_mode()
    def layers(self) -> Iterator[LayerError]:
        """Take both models through each layer, and say how far apart they are behind it."""
        for index, layer in enumerate(self._layers):
            matrices = []
            for model, states in zip(self._models, self._states, strict=True):
                _load(layer, f"model.layers.{index}", model)
                self._run(layer, states)
                matrices.append([p for p in layer.parameters() if p.dim() == 2])
            hidden = _relative([self._states[1]], [self._states[0]])
            yield LayerError(hidden, _relative(matrices[1], matrices[0]))
            layer.to_empty(device="meta")

    @torch.inference_mode()
    def logits(self, texts: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """After `layers`: for each row in turn the logits of both models, fp32 [positions, vocabulary].

        ``texts``: how many positions of each row are wanted. A long row comes in parts.
        """
        heads = [model(self._head) for model in self._models]
        normed = []
        for model, states in zip(self._models, self._states, strict=True):
            _load(self._norm, "model.norm", model)
            normed.append(self._norm(states))
        step = max(1, _LOGITS_AT_ONCE // heads[0].shape[0])
        for row, count in enumerate(texts):
            for first in range(0, count, step):
                part = slice(first, min(first + step, count))
                one, other = (
                    nn.functional.linear(states[row, part], head).float()
                    for states, head in zip(normed, heads, strict=True)
                )
                yield one, other

    def _run(self, layer: nn.Module, states: torch.Tensor) -> None:
        """A few rows at a time, in place."""
        rows = max(1, _TOKENS_AT_ONCE // states.shape[1])
        for first in range(0, len(states), rows):
            some = states[first : first + rows]
            rotation = self._rotary(some, self._positions)
            some.copy_(layer(some, attention_mask=None, position_embeddings=rotation))


def _load(module: nn.Module, prefix: str, model: Tensors) -> None:
    tensors = {name: model(f"{prefix}.{name}") for name, _ in module.named_parameters()}
    module.load_state_dict(tensors, assign=True)


def _relative(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    wrong = sum(
        float((a.float() - b.float()).square().sum()) for a, b in zip(found, expected, strict=True)
    )
    size = sum(float(b.float().square().sum()) for b in expected)
    return math.sqrt(wrong / size) if size else 0.0
