"""A report that also writes down when tokens came, and how long the model's passes took."""

from __future__ import annotations

from typing import Any

from torch import nn

from common.trace import Tracer, now
from engine.client import WeightClient
from engine.generate import Answer
from engine.report import Report


class TracedReport(Report):
    """Notes tokens, and in them the passes of the model: the prefill, then one for each token."""

    def __init__(self, tracer: Tracer, client: WeightClient, model: nn.Module) -> None:
        super().__init__(client)
        self._tracer = tracer
        self._since_ns = self._pass_ns = self._number = 0
        model.register_forward_pre_hook(self._pass_begins)
        model.register_forward_hook(self._pass_ends, with_kwargs=True)

    def token(self) -> None:
        super().token()
        at = now()
        self._tracer.span("tokens", "token", self._since_ns, at, {"number": self._number})
        self._number += 1
        self._since_ns = at

    def add(self, answer: Answer) -> None:
        super().add(answer)
        self._since_ns = self._number = 0

    def _pass_begins(self, model: nn.Module, inputs: Any) -> None:
        self._pass_ns = now()
        self._since_ns = self._since_ns or self._pass_ns

    def _pass_ends(self, model: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        name = "pass" if self._number else "prefill"
        ids = named.get("input_ids")
        args = {} if ids is None else {"tokens": ids.numel()}
        self._tracer.span("tokens", name, self._pass_ns, now(), args)
