"""Attention in a pass over several sequences: each looks at its own keys and values, by the model's own call.

The tokens of all sequences lie one behind the other in one row. What concerns single tokens (products,
norms) does not care; attention takes the row apart again. Where the fused step could be taken, a kernel
does that for all that have a single token. Registered with transformers, which hands on what it does not
know, here the ``company``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engine.batch.kernels import ManyPasts
from engine.cache import PastLayer, as_argument, past, reserve

NAME = "weight_feeder_batch"


@dataclass(frozen=True)
class Part:
    """The tokens of one sequence in a pass. ``start``: so many came before, and are in ``cache``."""

    ids: tuple[int, ...]
    start: int
    cache: DynamicCache

    def roll_back(self) -> None:
        """Forget what a pass that was not completed has added."""
        for layer in past(self.cache):
            if layer.is_initialized and layer.get_seq_length() > self.start:
                layer.set_length(self.start)


class Company:
    """The parts of one pass, and what attention makes of them."""

    def __init__(self, model: Any, parts: Sequence[Part], fused: bool = False) -> None:
        """``fused``: whether single tokens of different sequences may take one launch."""
        self.parts = parts
        self._attend = _attention_of(model)
        ends = torch.tensor([len(part.ids) for part in parts]).cumsum(0).tolist()
        self.spans = list(zip([0, *ends[:-1]], ends, strict=True))
        self.positions = torch.tensor(
            [[p for part in parts for p in range(part.start, part.start + len(part.ids))]],
            device=model.device,
        )
        self._masks = [
            _masks(model, part, self.positions[:, a:b])
            for part, (a, b) in zip(parts, self.spans, strict=True)
        ]
        singles = [i for i, part in enumerate(parts) if fused and part.start and len(part.ids) == 1]
        self._singles = set(singles) if len(singles) > 1 else set()
        self._many: ManyPasts | None = None
        if self._singles:
            for i in singles:
                reserve(parts[i].cache, parts[i].start + 1)
            pasts = [[_memory(layer) for layer in past(parts[i].cache)] for i in singles]
            lengths, rows = [parts[i].start for i in singles], [self.spans[i][0] for i in singles]
            self._many = ManyPasts(pasts, lengths, rows, model.config.num_attention_heads)

    def passed(self) -> None:
        """The pass is complete: what the kernels have added to the caches counts."""
        for i in self._singles:
            for layer in past(self.parts[i].cache):
                layer.set_length(self.parts[i].start + 1)

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **named: Any,
    ) -> torch.Tensor:
        """query [1, heads, rows, D], key and value [1, KV heads, rows, D]: [1, rows, heads, D]."""
        sliding = named.get("sliding_window") is not None
        output = query.new_empty((1, query.shape[2], query.shape[1], query.shape[3]))
        if self._many is not None:  # no layer's window is shorter than the context then
            self._many.attend(module.layer_idx, query, key, value, named["scaling"], output)
        for i, (part, masks) in enumerate(zip(self.parts, self._masks, strict=True)):
            if i in self._singles:
                continue
            a, b = self.spans[i]
            layer = part.cache.layers[module.layer_idx]
            assert isinstance(layer, PastLayer)
            if layer.is_initialized:  # so that a pass can be made again
                layer.set_length(part.start)
            keys, values = layer.update(key[:, :, a:b], value[:, :, a:b])
            # As it lies in memory when the sequence is alone.
            own = query[:, :, a:b].transpose(1, 2).contiguous().transpose(1, 2)
            if "position_ids" in named:
                named["position_ids"] = self.positions[:, a:b]
            output[:, a:b], _ = self._attend(module, own, keys, values, masks[sliding], **named)
        return output


def batched(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    company: Company,
    **named: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls. There is no mask: every part brings its own."""
    return company.attend(module, query, key, value, **named), None


AttentionInterface.register(NAME, batched)


@contextmanager
def taking_turns(model: Any) -> Iterator[None]:
    """The model's attention is that of a company, until the block is left."""
    config = model.config
    former = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = former


def _memory(layer: PastLayer) -> tuple[torch.Tensor, torch.Tensor]:
    assert layer.memory is not None
    return layer.memory


def _attention_of(model: Any) -> Callable[..., Any]:
    """The attention that the model uses when it is not in company."""
    eager: Any = getattr(sys.modules[type(model).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(model.config._attn_implementation, eager)


def _masks(model: Any, part: Part, positions: torch.Tensor) -> dict[bool, Any]:
    """What the model itself makes for a sequence that is alone, by whether the layer's window slides."""
    config = model.config
    like = torch.empty((1, len(part.ids), 0), dtype=model.dtype, device=model.device)
    asked = {
        "config": config, "inputs_embeds": like, "attention_mask": None,
        **as_argument(part.cache), "position_ids": positions,
    }  # fmt: skip
    masks = {False: create_causal_mask(**asked)}
    if getattr(config, "sliding_window", None) is not None:
        masks[True] = create_sliding_window_causal_mask(**asked)
    return masks
