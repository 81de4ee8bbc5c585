"""One pass of the model over parts of several sequences: tokens and caches in, logits out.

Knows what a pass is made of, and nothing of requests: engine/batch/batch.py says what goes into one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache

from common.shortages import shortages
from engine.batch.attention import Company, Part, taking_turns
from engine.cache import as_argument, reserve
from engine.linear import FedLinear
from engine.rows import Rows, divide

if TYPE_CHECKING:
    from engine.steps import Steps

Survive = Callable[[Callable[[], Any], Any], Any]


class Passes:
    """``step``: takes a single token of a sequence that is alone, if the model can be stepped through;
    its kind of kernels then takes those of several.
    ``survive``: makes a call, again if memory ran out in it and could be had."""

    def __init__(
        self,
        model: Any,
        step: Steps | None = None,
        survive: Survive = lambda call, _: call(),
    ) -> None:
        self._model, self._step, self._survive = model, step, survive
        self._rows = Rows()
        self._divide()

    @torch.no_grad()
    def __call__(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        """For each part the logits, [1, vocabulary], of the token that follows its last. MemoryShortageError
        if memory does not suffice; then it is as if the pass had not been made."""
        for part in parts:
            part.roll_back()
        if len(parts) > 1:
            return self._together(parts)
        (part,) = parts
        ids = torch.tensor([part.ids], device=self._model.device)
        useful = self._step is not None and self._step.useful
        if useful and len(part.ids) == 1 and part.start:
            return [self.ahead(ids, part.cache)]
        self.rest()
        output = self._model(
            input_ids=ids, **as_argument(part.cache), use_cache=True, logits_to_keep=1
        )
        return [output.logits[:, -1]]

    @torch.no_grad()
    def ahead(self, token: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """The logits after one token, [1, 1], of a sequence that is alone, by the step: it need not have
        been read."""
        step = self._step
        assert step is not None

        def take() -> torch.Tensor:
            reserve(cache, cache.get_seq_length() + 1)
            return step(token, cache)

        logits: torch.Tensor = self.restfully(take, cache)
        return logits

    @property
    def graphed(self) -> bool:
        """Whether the last pass was one launch."""
        return self._step is not None and self._step.graphed

    @property
    def _fused(self) -> bool:
        return self._step is not None and self._step.packed

    def rest(self) -> None:
        """Give back what a step holds: who holds leases must not wait for others."""
        if self._step is not None:
            self._step.rest()

    def restfully(self, call: Callable[[], Any], cache: Any = None) -> Any:
        """Make a call that may run out of memory; what the step holds can be given up for it."""

        def attempt() -> Any:
            try:
                with shortages():
                    return call()
            except torch.OutOfMemoryError:
                self.rest()
                raise

        return self._survive(attempt, cache)

    def _together(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        self.rest()
        model = self._model
        company: Company = self._survive(lambda: Company(model, parts, self._fused), None)
        ids = torch.tensor([[token for part in parts for token in part.ids]], device=model.device)
        last = torch.tensor([end - 1 for _, end in company.spans], device=model.device)
        lengths = [len(part.ids) for part in parts]
        with taking_turns(model), self._rows.divided(lengths):
            output = model(
                input_ids=ids, position_ids=company.positions, use_cache=False,
                logits_to_keep=last, company=company,
            )  # fmt: skip
        company.passed()
        return [output.logits[:, index] for index in range(len(parts))]

    def _divide(self) -> None:
        """On the CPU every module that computes, and is not made of others, is to see one sequence at
        a time."""
        if self._model.device.type != "cpu":
            return
        for module in self._model.modules():
            if isinstance(module, FedLinear):
                module.products.rows = self._rows
            elif not isinstance(module, nn.Embedding) and not any(True for _ in module.children()):
                divide(module, self._rows)
