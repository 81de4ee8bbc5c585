"""A decoder a layer at a time: weights come when their layer's turn does, and go when it is over.

Owns transformers' own modules, empty but for the layer that runs, and what runs through them. Knows
nothing of text, of quantizing or of what is made of the results. So no more than one layer of a model
is on the device, and hidden states stay in host memory but for the few rows that are being run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from common import int4
from common.checkpoint import EMBEDDING, HEAD
from common.hollow import hollow
from common.store import Store
from feeder.checkpoints.source import Grouped, Source

# A tensor of a model by its checkpoint name, in the dtype and on the device of the work.
Tensors = Callable[[str], torch.Tensor]
_TOKENS_AT_ONCE = 2048  # through a layer


def of_source(source: Source, device: torch.device, dtype: torch.dtype) -> Tensors:
    """The tensors of a checkpoint, of whatever kind, as values."""
    shapes = {part.name: part.shape for part in source.parts()}

    def read(name: str) -> torch.Tensor:
        found = torch.empty(shapes[name], dtype=dtype, device=device)
        flat, first = found.view(-1), 0
        for piece in source.pieces(name, device):
            values = piece.values() if isinstance(piece, Grouped) else piece
            flat[first : first + values.numel()] = values.to(device).view(-1)
            first += values.numel()
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


class Decoder:
    """The layers of one architecture, for any number of models of it, one after the other.

    ``config``: of the checkpoint. ``poll`` is called between batches; what it raises goes through.
    Attention is causal, without a window, so that what follows a text's end does not reach it: texts
    are no longer than `feeder.texts.longest`. Raises ConfigError if transformers refuses the config.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        device: torch.device,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        # Given no mask, sdpa is causal; eval: without dropout.
        skeleton = hollow(config, "the model's config", device, "sdpa").eval()
        self._rotary = skeleton.model.rotary_emb
        self.count = len(skeleton.model.layers)
        self.head = EMBEDDING if skeleton.config.tie_word_embeddings else HEAD
        self._layers, self._norm = skeleton.model.layers, skeleton.model.norm
        self._device, self._poll = device, poll

    def embed(self, ids: torch.Tensor, model: Tensors) -> torch.Tensor:
        """Hidden states [rows, length, hidden], in host memory, of tokens [rows, length]."""
        return nn.functional.embedding(ids.to(self._device), model(EMBEDDING)).cpu()

    def layer(self, index: int, model: Tensors) -> nn.Module:
        """A layer with the weights of ``model``, until `leave`."""
        _load(self._layers[index], f"model.layers.{index}", model)
        return self._layers[index]

    def leave(self, index: int) -> None:
        """Drop the layer's weights."""
        self._layers[index].to_empty(device="meta")
        _give_back()

    def batches(self, states: torch.Tensor) -> Iterator[slice]:
        """The rows of hidden states [rows, length, hidden], as many at once as are to be run at once."""
        rows = max(1, _TOKENS_AT_ONCE // states.shape[1])
        for first in range(0, len(states), rows):
            self._poll()
            yield slice(first, min(first + rows, len(states)))

    @torch.inference_mode()
    def forward(self, layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """What comes out of a layer, on the device, of the hidden states of one batch."""
        states = states.to(self._device)
        positions = torch.arange(states.shape[1], device=self._device)[None]
        rotation = self._rotary(states, positions)
        return layer(states, attention_mask=None, position_embeddings=rotation)

    def norm(self, model: Tensors) -> nn.Module:
        """What lies between the last layer and the head, with the weights of ``model``."""
        _load(self._norm, "model.norm", model)
        return self._norm


def _give_back() -> None:
    """Have the C library return what is free. It keeps matrices of up to 32 MiB, in holes that the next
    layer's do not fit into for their alignment, so that memory would grow with every layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def _load(module: nn.Module, prefix: str, model: Tensors) -> None:
    tensors = {name: model(f"{prefix}.{name}") for name, _ in module.named_parameters()}
    module.load_state_dict(tensors, assign=True)
