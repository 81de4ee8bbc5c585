"""Texts with and without candidates, by the loop that an engine uses."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import set_seed

from common.config import Speculate
from engine.draft import Draft
from engine.loop import Loop
from engine.speculation import Drafting, Speculation


def loop(speculation: Speculation | None = None, draft: Draft | None = None) -> Loop:
    """A loop whose memory never runs out."""
    return Loop(None, lambda call, _: call(), speculation, draft)


def lookup(text: str = "lookup") -> Speculation:
    """Without a clock: every pass takes no time, and only what is right and wrong counts."""
    return Speculation(Speculate.parse(text), clock=lambda: 0.0)


def generate(
    model: Any,
    prompt: list[int],
    with_loop: Loop,
    seed: int = 0,
    seeded: bool = False,
    **options: Any,
) -> list[int]:
    """What follows ``prompt``. It is checked that the streamer got the same, token by token."""
    put: list[int] = []
    set_seed(seed)
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=partial(with_loop, put=lambda token: put.append(int(token)), seeded=seeded),
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

    def propose(self, limit: int, draft: Drafting | None = None) -> list[int]:
        candidates = super().propose(limit, draft)
        assert len(candidates) <= max(0, limit)
        self.passes.append((candidates, []))
        return candidates

    def add(self, token: int) -> None:
        super().add(token)
        if self.passes:
            self.passes[-1][1].append(token)

    def begin(self, prompt: list[int], repeatable: bool = True) -> None:
        super().begin(prompt, repeatable)
        self.passes.clear()


class Always(Speculation):
    """Has so many candidates drafted for every pass, whether or not that pays."""

    resting = False  # type: ignore[assignment]

    def __init__(self, count: int) -> None:
        super().__init__(Speculate("draft"), clock=lambda: 0.0)
        self._count = count

    def _candidates(self, limit: int, draft: Drafting | None) -> list[int]:
        self._pace = self._drafted.pace
        return self._draft(draft, min(limit, self._count)) if draft is not None else []


class Lent:
    """What a draft asks of its client, where there is no feeder: ``stays``."""

    stays = True

    def stay(self, weights: range) -> bool:
        return self.stays


def draft_of(model: Any, vocabulary: int, lent: Lent | None = None) -> Draft:
    """A draft that guesses by ``model`` for a model of so many tokens."""
    client: Any = lent or Lent()
    return Draft(model, None, client, range(0), vocabulary)
