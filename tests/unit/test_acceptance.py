"""What is drawn with a draft's help has the distribution that it has without, whatever the draft believes.

Chi-square against the exact distribution, of draws with a fixed seed: the same figures every time.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MaxLengthCriteria,
    Qwen2Config,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from engine.acceptance import draw
from engine.cache import CACHE_ARGUMENT
from tests.speculating import Always, draft_of, loop

pytestmark = pytest.mark.usefixtures("one_thread")
DRAWS = 40_000


def chi_square(seen: dict[Any, int], chances: dict[Any, float]) -> float:
    """In standard deviations of a chi-square of as many degrees of freedom: below 4 by chance, and
    infinite if something was drawn that cannot be. What is expected less than five times is put together."""
    if any(chances.get(key, 0.0) < 1e-9 for key in seen):
        return math.inf
    total = sum(seen.values())
    cells = [(seen.get(key, 0), total * chance) for key, chance in chances.items()]
    often = [cell for cell in cells if cell[1] >= 5]
    rare = [sum(column) for column in zip(*[cell for cell in cells if cell[1] < 5], strict=True)]
    if rare and rare[1] > 0:
        often.append((rare[0], rare[1]))
    freedom = len(often) - 1
    value = sum((count - expected) ** 2 / expected for count, expected in often)
    return (value - freedom) / (2 * freedom) ** 0.5


def counted(tokens: torch.Tensor) -> dict[int, int]:
    return Counter(tokens.flatten().tolist())


def as_dict(chances: torch.Tensor) -> dict[int, float]:
    return dict(enumerate(chances.double().flatten().tolist()))


def distribution(seed: int, cut: int = 0) -> torch.Tensor:
    """Eight chances, float32 [1, 8], the ``cut`` smallest of them 0."""
    scores = 1.5 * torch.randn((1, 8), generator=torch.Generator().manual_seed(seed))
    scores.scatter_(1, scores.topk(cut, largest=False).indices, -torch.inf)
    return scores.softmax(-1)


PAIRS = {
    "two of random": (distribution(1), distribution(2)),
    "both cut": (distribution(3, 4), distribution(4, 5)),
    "the same": (distribution(5), distribution(5)),
    "nothing in common": (torch.tensor([[0.3, 0.7, 0, 0]]), torch.tensor([[0, 0, 0.6, 0.4]])),
    "one is sure": (distribution(6), torch.tensor([[0, 0, 1.0, 0, 0, 0, 0, 0]])),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_rule(name: str) -> None:
    chances, believed = PAIRS[name]
    torch.manual_seed(1)
    many = partial(torch.Tensor.expand, size=(DRAWS, -1))
    candidates = torch.multinomial(many(believed), 1)
    tokens = draw(many(chances), candidates, many(believed))
    assert chi_square(counted(tokens), as_dict(chances)) < 4
    overlap = float(torch.minimum(chances, believed).sum())
    taken = float((tokens == candidates).float().mean())
    assert taken == pytest.approx(overlap, abs=4 * 0.5 / DRAWS**0.5)  # no rule accepts more


def test_chi_square_tells_another_distribution() -> None:
    """Else the tests here would show nothing: of the draft, and of a rule that draws again from all."""
    chances, believed = PAIRS["two of random"]
    torch.manual_seed(1)
    candidates = torch.multinomial(believed.expand(DRAWS, -1), 1)
    assert chi_square(counted(candidates), as_dict(chances)) > 20
    again = torch.multinomial(chances.expand(DRAWS, -1), 1)
    taken = torch.rand(DRAWS, 1) < (chances / believed)[0][candidates]
    assert chi_square(counted(torch.where(taken, candidates, again)), as_dict(chances)) > 20


class Table:
    """A model whose next token depends on the last one alone; it has a KV cache all the same."""

    def __init__(self, seed: int, tokens: int = 4) -> None:
        self.scores = 1.2 * torch.randn(
            (tokens, tokens), generator=torch.Generator().manual_seed(seed)
        )
        self.config = Qwen2Config(
            num_hidden_layers=1, max_position_embeddings=64, vocab_size=tokens
        )

    def __call__(self, input_ids: torch.Tensor, **named: Any) -> Any:
        states = input_ids.float().view(1, 1, -1, 1)
        keys, _ = named[CACHE_ARGUMENT].update(states, states, 0)
        last = keys[0, 0, :, 0].long()[-input_ids.shape[1] :]  # what the cache says was read
        return SimpleNamespace(logits=self.scores[last][None])


LENGTH, TEXTS = 4, 1500  # the first token is the prompt's pass's, and the last one nobody drafts
PROCESSORS = [
    RepetitionPenaltyLogitsProcessor(1.8),
    TemperatureLogitsWarper(0.8),
    TopKLogitsWarper(3),
]


def exact(model: Table, processors: LogitsProcessorList, prompt: list[int]) -> dict[Any, float]:
    """The chance of every text of LENGTH tokens."""
    found = {}
    for text in itertools.product(range(4), repeat=LENGTH):
        chance, ids = 1.0, list(prompt)
        for token in text:
            scores = processors(torch.tensor([ids]), model.scores[ids[-1]][None].clone())
            chance *= float(scores.double().softmax(-1)[0, token])
            ids.append(token)
        found[text] = chance
    return found


def texts(
    model: Table, with_loop: Any, processors: LogitsProcessorList, prompt: list[int],
    count: int = TEXTS, **named: Any,
) -> dict[Any, int]:  # fmt: skip
    config = SimpleNamespace(do_sample=True, prefill_chunk_size=None)
    ends = StoppingCriteriaList([MaxLengthCriteria(len(prompt) + LENGTH)])
    ids = torch.tensor([prompt])
    found: Counter[Any] = Counter()
    for _ in range(count):
        whole = with_loop(model, ids, processors, ends, config, put=lambda token: None, **named)
        found[tuple(whole[0, len(prompt) :].tolist())] += 1
    return found


def test_whole_texts() -> None:
    """One or two tokens are drafted for a pass: taken, refused, and followed by one more, all three."""
    model, draft, prompt = Table(1), Table(2), [3, 1]
    processors = LogitsProcessorList(PROCESSORS)
    speculation = Always(2)
    torch.manual_seed(2)
    with torch.no_grad():
        with_draft = loop(speculation, draft_of(draft, 4))  # type: ignore[arg-type]
        seen = texts(model, with_draft, processors, prompt)
    assert chi_square(seen, exact(model, processors, prompt)) < 4
    figures = speculation.figures()
    assert 0.2 * figures["candidates"] < figures["accepted"] < 0.9 * figures["candidates"]
    assert figures["candidates"] > 1.2 * figures["wide_passes"]
    assert chi_square(seen, exact(draft, processors, prompt)) > 20


class Draws(Always):
    """Notes of each proposal whether the model's random numbers are others after it."""

    def __init__(self) -> None:
        super().__init__(2)
        self.advanced: set[bool] = set()

    def _draft(self, draft: Any, count: int) -> list[int]:
        before = torch.get_rng_state()
        found = super()._draft(draft, count)
        self.advanced.add(not torch.equal(before, torch.get_rng_state()))
        return found


@pytest.mark.parametrize("seeded", [False, True])
def test_a_draft_draws_for_itself_but_with_a_seed(seeded: bool) -> None:
    """Were the rule's draws those of the candidates, it would be wrong. With a seed they have to be."""
    speculation, processors = Draws(), LogitsProcessorList(PROCESSORS)
    with_draft = loop(speculation, draft_of(Table(2), 4))  # type: ignore[arg-type]
    texts(Table(1), with_draft, processors, [3, 1], count=5, seeded=seeded)
    assert speculation.advanced == {not seeded}
