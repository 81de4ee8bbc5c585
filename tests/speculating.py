"""Texts with and without candidates, by the loop that an engine uses."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import set_seed

from common.config import Speculate
from engine.loop import Loop
from engine.speculation import Speculation


def loop(speculation: Speculation | None = None) -> Loop:
    """A loop whose memory never runs out."""
    return Loop(None, lambda call, _: call(), speculation)


def lookup(text: str = "lookup") -> Speculation:
    """Without a clock: every pass takes no time, and only what is right and wrong counts."""
    return Speculation(Speculate.parse(text), clock=lambda: 0.0)


def generate(
    model: Any, prompt: list[int], with_loop: Loop, seed: int = 0, **options: Any
) -> list[int]:
    """What follows ``prompt``. It is checked that the streamer got the same, token by token."""
    put: list[int] = []
    set_seed(seed)
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=partial(with_loop, put=lambda token: put.append(int(token))),
        **options,
    )
    found = output[0, len(prompt) :].tolist()
    assert put == found
    assert output[0, : len(prompt)].tolist() == prompt
    return found


class Watched(Speculation):
    """Notes what was proposed, and with which tokens the text went on from there."""

    def __init__(self, text: str = "lookup") -> None:
        super().__init__(Speculate.parse(text), clock=lambda: 0.0)
        self.passes: list[tuple[list[int], list[int]]] = []

    def propose(self, limit: int) -> list[int]:
        candidates = super().propose(limit)
        assert len(candidates) <= max(0, limit)
        self.passes.append((candidates, []))
        return candidates

    def add(self, token: int) -> None:
        super().add(token)
        if self.passes:
            self.passes[-1][1].append(token)

    def begin(self, prompt: list[int]) -> None:
        super().begin(prompt)
        self.passes.clear()
