"""A store and its original on the same text, a layer at a time, each on its own hidden states.

Owns the two walks and the figures. `feeder.layerwise` runs the layers. So no more of each model is in
memory than one layer, or the embedding, or the head, and hidden states stay in host memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from common.quality import Quality
from feeder.layerwise import Decoder, Tensors
from feeder.texts import Rows, Text

_LOGITS_AT_ONCE = 1 << 25  # 128 MiB in fp32


@dataclass(frozen=True)
class LayerError:
    """How far a layer's output, and its weights, are from the original's; Frobenius, relative."""

    hidden: float
    weights: float


class Pair:
    """Two models of one architecture, and where each has come to with its hidden states.

    ``models``: the original, the quantized. ``ids``: tokens [rows, length]; each row is a text of its own.
    """

    def __init__(
        self, decoder: Decoder, models: tuple[Tensors, Tensors], ids: torch.Tensor
    ) -> None:
        self._decoder, self._models = decoder, models
        self._states = [decoder.embed(ids, model) for model in models]

    @torch.inference_mode()
    def layers(self) -> Iterator[LayerError]:
        """Take both models through each layer, and say how far apart they are behind it."""
        for index in range(self._decoder.count):
            matrices = []
            for model, states in zip(self._models, self._states, strict=True):
                layer = self._decoder.layer(index, model)
                for part in self._decoder.batches(states):
                    states[part] = self._decoder.forward(layer, states[part])
                matrices.append([p for p in layer.parameters() if p.dim() == 2])
            hidden = _relative([self._states[1]], [self._states[0]])
            yield LayerError(hidden, _relative(matrices[1], matrices[0]))
            self._decoder.leave(index)

    @torch.inference_mode()
    def logits(self, texts: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """After `layers`: for each row in turn the logits of both models, fp32 [positions, vocabulary].

        ``texts``: how many positions of each row are wanted. A long row comes in parts.
        """
        heads = [model(self._decoder.head) for model in self._models]
        for model, states in zip(self._models, self._states, strict=True):
            norm = self._decoder.norm(model)
            for part in self._decoder.batches(states):
                states[part] = norm(states[part].to(heads[0].device))
        step = max(1, _LOGITS_AT_ONCE // heads[0].shape[0])
        for row, count in enumerate(texts):
            for first in range(0, count, step):
                part = slice(first, min(first + step, count))
                one, other = (
                    nn.functional.linear(states[row, part].to(head.device), head).float()
                    for states, head in zip(self._states, heads, strict=True)
                )
                yield one, other


def compare(
    config: Mapping[str, Any],
    models: tuple[Tensors, Tensors],
    text: Text,
    rows: Rows,
    device: torch.device,
    poll: Callable[[], None] = lambda: None,
    note: Callable[[LayerError], object] = lambda error: None,
) -> Quality:
    """The figures of the second model against the first, of every token but the first of each row.

    ``note`` is told each layer's error as the layer is done, ``poll`` called often. ValueError if a
    figure is not finite.
    """
    pair = Pair(Decoder(config, device, poll), models, rows.ids)
    for error in pair.layers():
        note(error)
    predicted = [length - 1 for length in rows.lengths]
    wanted = torch.cat([row[1 : count + 1] for row, count in zip(rows.ids, predicted, strict=True)])
    divergences, losses, agreements, first = [], [], 0, 0
    for logits in pair.logits(predicted):
        poll()
        original, quantized = (part.log_softmax(-1) for part in logits)
        divergences.append((original.exp() * (original - quantized)).sum(-1).double().cpu())
        agreements += int((original.argmax(-1) == quantized.argmax(-1)).sum())
        targets = wanted[first : first + len(original), None].to(original.device)
        both = [-part.gather(-1, targets)[:, 0].double().cpu() for part in (original, quantized)]
        losses.append(torch.stack(both))
        first += len(original)
    divergence, loss = torch.cat(divergences), torch.cat(losses, 1).mean(1)
    return Quality(
        kl_mean=float(divergence.mean()),
        kl_p99=float(divergence.sort().values[math.ceil(0.99 * len(divergence)) - 1]),
        perplexity=float(loss[1].exp()),
        perplexity_original=float(loss[0].exp()),
        top1_agreement=agreements / len(divergence),
        tokens=rows.tokens,
        text=text.name,
        text_checksum=text.checksum,
    )


def _relative(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    wrong = sum(
        float((a.float() - b.float()).square().sum()) for a, b in zip(found, expected, strict=True)
    )
    size = sum(float(b.float().square().sum()) for b in expected)
    return math.sqrt(wrong / size) if size else 0.0
