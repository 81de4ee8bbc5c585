"""Whatever is proposed, the text is what it was: token by token, also where it ends, also when sampled."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, StoppingCriteria, StoppingCriteriaList

from common.config import Speculate
from engine.speculation import Speculation
from tests.speculating import Watched, generate, lookup, loop

pytestmark = pytest.mark.usefixtures("one_thread")
EOS = 1


def make_model(vocabulary: int, spread: float, seed: int = 0) -> Qwen2ForCausalLM:
    """``spread``: of its logits; the larger, the surer it is of what follows."""
    config = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=vocabulary, max_position_embeddings=512,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        model.lm_head.weight.data.normal_(0, spread)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    return make_model(8, 0.15)


def draw_prompt(seed: int, vocabulary: int = 8) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (20,), generator=generator).tolist() * 2


SAMPLED: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": 40}


def test_sampled_text_is_that_of_the_same_seed_and_ends_with_eos(model: Qwen2ForCausalLM) -> None:
    """In this vocabulary many guesses are right, and many are the end of the text."""
    watched, ends = Watched("lookup:6"), Counter()
    with_candidates = loop(watched)
    for seed in range(60):
        prompt = draw_prompt(seed)
        expected = generate(model, prompt, loop(), seed, **SAMPLED)
        assert generate(model, prompt, with_candidates, seed, **SAMPLED) == expected
        if watched.passes and expected[-1] == EOS:
            candidates, came = watched.passes[-1]
            last = len(came) - 1  # the end was a candidate, or came instead of one, or after all
            ends["accepted" if candidates[last : last + 1] == [EOS] else "own"] += 1
            ends["rest dropped"] += len(candidates) > len(came)
    assert min(ends["accepted"], ends["own"], ends["rest dropped"]) >= 3, ends
    assert watched.figures()["accepted"] > 50


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": True, "repetition_penalty": 1.3, "temperature": 0.7, "top_k": 5},
        {"do_sample": True, "no_repeat_ngram_size": 3, "top_p": 0.9},
        {"do_sample": False, "prefill_chunk_size": 7},
        {"do_sample": False, "min_new_tokens": 9},
    ],
)
def test_processors_see_the_tokens_before_theirs(
    model: Qwen2ForCausalLM, options: dict[str, Any]
) -> None:
    speculation = lookup("lookup:6")
    with_candidates = loop(speculation)
    for seed in range(20):
        prompt = draw_prompt(seed)
        expected = generate(model, prompt, loop(), seed, max_new_tokens=30, **options)
        found = generate(model, prompt, with_candidates, seed, max_new_tokens=30, **options)
        assert found == expected
    assert speculation.figures()["candidates"] > 20


@pytest.fixture(scope="module")
def steady() -> Qwen2ForCausalLM:
    """Greedy, it soon repeats itself."""
    return make_model(64, 1.0, seed=2)


@pytest.mark.parametrize("limit", [*range(1, 30), 60])
def test_no_token_more_than_asked_for(steady: Qwen2ForCausalLM, limit: int) -> None:
    options = {"do_sample": False, "eos_token_id": None}
    expected = generate(steady, [5, 6, 7], loop(), max_new_tokens=60, **options)
    watched = Watched()
    found = generate(steady, [5, 6, 7], loop(watched), max_new_tokens=limit, **options)
    assert found == expected[:limit]
    left = limit - 1
    for candidates, came in watched.passes:
        assert len(came) <= len(candidates) + 1 <= left  # no pass is wider than it can pay
        left -= len(came)
    if limit == 60:
        assert watched.figures()["tokens_per_pass"] > 1.5


class Thrice(StoppingCriteria):
    """The text ends where a pair of tokens is there for the third time."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        text = input_ids[0].tolist()
        pairs = Counter(itertools.pairwise(text))
        return torch.tensor([pairs[tuple(text[-2:])] >= 3])


def test_a_stop_in_the_middle_of_candidates(steady: Qwen2ForCausalLM) -> None:
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 60}
    inside = 0
    watched = Watched()
    with_candidates = loop(watched)
    for first in range(2, 40):
        stop = StoppingCriteriaList([Thrice()])
        expected = generate(steady, [first], loop(), stopping_criteria=stop, **options)
        found = generate(steady, [first], with_candidates, stopping_criteria=stop, **options)
        assert found == expected
        candidates, came = watched.passes[-1]
        inside += len(came) < len(candidates)
    assert inside > 3


def test_texts_one_after_the_other_do_not_mix(steady: Qwen2ForCausalLM) -> None:
    options = {"do_sample": False, "eos_token_id": None}
    with_candidates = loop(lookup())
    for first, tokens in ((2, 90), (3, 5), (2, 40), (9, 70)):
        expected = generate(steady, [first], loop(), max_new_tokens=tokens, **options)
        found = generate(steady, [first], with_candidates, max_new_tokens=tokens, **options)
        assert found == expected


@pytest.mark.parametrize(
    ("sampled", "seeded", "repeatable"),
    [(False, False, True), (True, True, True), (True, False, False)],
)
@pytest.mark.parametrize("stepped", [False, True])
def test_which_texts_can_be_had_again(
    model: Qwen2ForCausalLM, sampled: bool, seeded: bool, repeatable: bool, stepped: bool
) -> None:
    """Those of which ``auto`` keeps away where a pass over several tokens rounds otherwise."""
    speculation = Speculation(
        Speculate(), clock=lambda: 0.0, rounds=True, most=lambda: 16 if stepped else 1
    )
    options = {"do_sample": sampled, "max_new_tokens": 60, "eos_token_id": None}
    generate(model, [2, 3] * 4, loop(speculation), seeded=seeded, **options)
    assert bool(speculation.off) == (repeatable and not stepped)
    assert (speculation.figures()["candidates"] > 0) == (stepped or not repeatable)


def test_auto_asks_before_each_pass_whether_a_step_makes_it() -> None:
    """Another kind of slots may change that."""
    now = [16]
    speculation = Speculation(Speculate(), clock=lambda: 0.0, rounds=True, most=lambda: now[0])
    speculation.begin([3, 4, 5] * 9)
    found = []
    for now[0] in (16, 16, 16, 1, 3):
        candidates = speculation.propose(4)
        found.append(len(candidates))
        for token in candidates or [3]:
            speculation.add(token)
    assert found[:2] == [0, 0]  # first a pass of one is measured
    assert found[2] > 2 and found[3:] == [0, 2]  # no more than the step takes beside the newest


class Proposing(Speculation):
    """Proposes what it is told, for the second token and the third."""

    def __init__(self, chains: dict[int, list[int]]) -> None:
        super().__init__(Speculate.parse("lookup"), clock=lambda: 0.0)
        self._chains, self.accepted = chains, 0

    def add(self, token: int) -> None:
        super().add(token)
        self._newest = token

    def propose(self, limit: int, draft: object = None) -> list[int]:
        super().propose(0)
        return self._chains[self._newest][:limit]


VOCABULARY, DRAWS = 5, 700


def exact_chances(model: Qwen2ForCausalLM, prompt: list[int]) -> torch.Tensor:
    """Of each three tokens, [V, V, V], from the definition: the softmax of the model's logits."""
    pairs = list(itertools.product(range(VOCABULARY), repeat=2))
    logits = model(torch.tensor([[*prompt, *pair] for pair in pairs])).logits
    chances = logits[:, len(prompt) - 1 :].double().softmax(-1).view(VOCABULARY, VOCABULARY, 3, -1)
    first, second, third = chances[0, 0, 0], chances[:, 0, 1], chances[:, :, 2]
    return first[:, None, None] * second[:, :, None] * third


def chi_square(counts: Counter[tuple[int, ...]], chances: torch.Tensor) -> tuple[float, int]:
    """The statistic and its degrees of freedom; what is expected less than five times is put together."""
    total = sum(counts.values())
    cells, rare, rare_seen = [], 0.0, 0
    for cell in itertools.product(range(VOCABULARY), repeat=3):
        expected = total * float(chances[cell])
        if expected < 5:
            rare, rare_seen = rare + expected, rare_seen + counts[cell]
        else:
            cells.append((counts[cell], expected))
    cells.append((rare_seen, rare))
    return sum((seen - e) ** 2 / e for seen, e in cells if e), len(cells) - 1


def limit(freedom: int) -> float:
    """What a chi-square exceeds once in a thousand times (Wilson and Hilferty's approximation)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + 3.09 * part**0.5) ** 3


@pytest.mark.parametrize("quality", ["good", "bad", "mixed"])
def test_the_distribution_of_sampled_text(quality: str) -> None:
    model, prompt = make_model(VOCABULARY, 0.2, seed=4), [0, 2, 3]
    exact = exact_chances(model, prompt)
    order = exact.flatten(1).argsort(-1, descending=True)
    rank = {"good": 0, "bad": -1, "mixed": 6}[quality]
    chains = {
        first: list(divmod(int(order[first, rank]), VOCABULARY)) for first in range(VOCABULARY)
    }
    with_candidates = loop(Proposing(chains))
    counts: Counter[tuple[int, ...]] = Counter()
    right = 0
    for seed in range(DRAWS):
        drawn = generate(
            model, prompt, with_candidates, seed, do_sample=True, top_k=0, max_new_tokens=3,
            eos_token_id=None,
        )  # fmt: skip
        counts[tuple(drawn)] += 1
        right += drawn[1] == chains[drawn[0]][0]
    assert right > 100 if quality == "good" else right > 5
    found, freedom = chi_square(counts, exact)
    assert freedom > 25
    assert found < limit(freedom)
    assert chi_square(counts, exact.flip(0))[0] > 2 * limit(freedom)  # it could have failed
