"""What takes tokens on a GPU: the fused step while slots are packed, the dense one while they are not.

Either may be missing, where a model does not fit it. Knows nothing of what they do.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from common.log import log
from engine.client import WeightClient
from engine.dense_step import DenseStep, unfit
from engine.lane import MOST_LANES
from engine.step import Step, supports

#: With dequantized slots a token of a pass costs four times the bytes and several times the launches.
DENSE_LANES = 8


class Steps:
    """Stands for one of two. ``useful``: whether a token may take it now; ``packed``: whether that is the
    fused one, so that kernels of its kind can take those of several sequences."""

    def __init__(self, fused: Step | None, dense: DenseStep | None) -> None:
        self._fused, self._dense = fused, dense

    @property
    def packed(self) -> bool:
        return self._fused is not None and self._fused.useful

    @property
    def useful(self) -> bool:
        return self.packed or (self._dense is not None and self._dense.useful)

    @property
    def most(self) -> int:
        """Over up to how many tokens `several` takes a pass now, that gives what passes over one give."""
        if self.packed:
            return MOST_LANES
        return DENSE_LANES if self.useful else 1

    @property
    def graphed(self) -> bool:
        """Whether the last token was one launch."""
        return self._fused is not None and self._fused.graphed

    def __call__(self, token: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """As of the one that is useful now."""
        return self._one()(token, cache)

    def several(self, tokens: torch.Tensor, cache: DynamicCache) -> list[torch.Tensor]:
        """As of the one that is useful now: the logits after each of ``tokens``, [1, up to ``most``], to the
        bit what calls with one after the other give."""
        return self._one().several(tokens, cache)

    def _one(self) -> Step | DenseStep:
        # Slots may have been swapped since `useful` was asked; the fused step takes any.
        if self._fused is not None and (self._fused.useful or self._dense is None):
            return self._fused
        self.rest()
        assert self._dense is not None
        return self._dense

    def rest(self) -> None:
        """No token is wanted for a while: give back what is held."""
        if self._fused is not None:
            self._fused.rest()


def steps_for(model: Any, client: WeightClient) -> Steps | None:
    """What the model fits; None if that is nothing. ``--verbose`` says why."""
    reason = supports(model)
    if reason:
        log.debug("while slots are packed, tokens take transformers' own forward pass: %s", reason)
    misfit = unfit(model) if model.device.type == "cuda" else "it is not on a GPU"
    if misfit:
        log.debug("while none is packed, tokens take transformers' own forward pass: %s", misfit)
    fused = None if reason else Step(model, client)
    dense = None if misfit else DenseStep(model, client)
    return Steps(fused, dense) if fused or dense else None
