"""The baseline that this project descends from: one process that dequantizes at every use.

Re-created, not the original script. The INT4 store lies in pageable host memory; at each use of a
weight that is not among the N used last, its codes and scales are copied to the device, the copy is
waited for, and torch's own operations (not this project's kernel) dequantize it. In a cyclic order
those N are never the ones that come next, so nothing is found again until everything fits.

The model is the engine's, so that only the way of the weights differs.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bench.decode import Decoder, spread
from common import int4
from common.memory import Memory
from common.shared import require_host_memory
from common.store import Store
from engine.linear import FedLinear
from engine.model import build_model

WARM_UP = 2  # passes: the prompt's, and one more


class _Linear(nn.Module):
    """An engine's Linear whose weight comes in the old way."""

    def __init__(self, fed: FedLinear, weights: SynchronousWeights) -> None:
        super().__init__()
        self.bias = fed.bias
        self._weight, self._weights = fed.weight_index, weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self._weights.get(self._weight), self.bias)


class SynchronousWeights:
    """All weights, packed, and some of them dequantized on the device."""

    def __init__(self, store: Store, device: torch.device, dtype: torch.dtype, cache: int) -> None:
        """Loads the store. MemoryShortageError if the host has not that much.

        ``cache``: how many dequantized weights stay, those used last; -1 for all.
        """
        self._shapes = [entry.shape for entry in store.weights]
        self._device, self._dtype = device, dtype
        self._capacity = len(self._shapes) if cache == -1 else cache
        self._held: OrderedDict[int, torch.Tensor] = OrderedDict()
        self.hits = self.uses = self.copied_bytes = 0
        require_host_memory(store.packed_bytes, "the baseline's store")

        def load(number: int) -> tuple[torch.Tensor, torch.Tensor]:
            codes, scales = store.read_weight(store.weights[number])
            return codes.clone(), scales.clone()

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            self._packed = list(pool.map(load, range(len(store.weights))))

    def get(self, weight: int) -> torch.Tensor:
        """The dequantized weight [N, K]; copies, waits and dequantizes if it is not there."""
        self.uses += 1
        if weight in self._held:
            self.hits += 1
            self._held.move_to_end(weight)
        else:
            if len(self._held) >= self._capacity:
                self._held.popitem(last=False)
            self._held[weight] = self._bring(weight)
        return self._held[weight]

    def _bring(self, weight: int) -> torch.Tensor:
        codes, scales = self._packed[weight]
        self.copied_bytes += codes.nbytes + scales.nbytes
        shape = self._shapes[weight]
        return dequantize(codes.to(self._device), scales.to(self._device), shape, self._dtype)


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """What common.int4.dequantize gives, to the bit, with fewer temporaries where blocks are whole.

    A code and a scale are exact in bf16 and fp32, and torch rounds their product once.
    """
    elements = shape[0] * shape[1]
    if elements % int4.BLOCK or dtype is torch.float16:
        return int4.dequantize(codes, scales, shape, dtype)
    values = int4.unpack(codes, elements).view(-1, int4.BLOCK).to(dtype)
    return values.mul_(scales.to(dtype)[:, None]).view(shape)


def measure(
    store: Store,
    memory: Memory,
    cache: int,
    prompt_tokens: int,
    steps: Callable[[Decoder], list[float]],
    most_tokens: int,
) -> dict[str, Any]:
    """Time tokens; ``steps`` runs the passes that are timed, ``most_tokens`` at most."""
    device = memory.device
    dtype = getattr(torch, store.dtype) if device.type == "cuda" else torch.float32
    weights = SynchronousWeights(store, device, dtype, cache)
    decoder = Decoder(_model(store, weights, memory, dtype), prompt_tokens, most_tokens + 1)
    for _ in range(WARM_UP):
        decoder.step()
    copied, hits, uses = weights.copied_bytes, weights.hits, weights.uses
    ms = steps(decoder)
    bytes_per_token = (weights.copied_bytes - copied) / len(ms)
    times = spread(ms)
    return {
        "host_memory": "pageable",
        "ms_per_token": times,
        "tok_per_s": round(1000 / times["median"], 4),
        "tokens": len(ms),
        "bytes_per_token": round(bytes_per_token),
        "bytes_per_s": round(bytes_per_token / (times["median"] / 1000)),
        "hit_rate": round((weights.hits - hits) / (weights.uses - uses), 6),
        "text_checksum": decoder.text_checksum(4),
    }


def _model(
    store: Store, weights: SynchronousWeights, memory: Memory, dtype: torch.dtype
) -> PreTrainedModel:
    """The engine's model, which is never to ask a feeder for anything."""
    nobody: Any = None
    model = build_model(store, nobody, memory, dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, FedLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _Linear(module, weights))
    return model
