"""What a draft proposes is what its model would say of this text, however the text went before; and the
text that comes of it is the text without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from common.config import Speculate
from engine.client import NotLent
from engine.draft import Draft
from engine.speculation import Speculation
from tests.speculating import Always, Lent, draft_of, generate, loop

pytestmark = pytest.mark.usefixtures("one_thread")
EOS = 1


def make_model(vocabulary: int, seed: int, context: int = 256) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=vocabulary, max_position_embeddings=context,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        model.lm_head.weight.data.normal_(0, 0.3)
    return model.eval().requires_grad_(False)


def nearly(model: Qwen2ForCausalLM, noise: float) -> Qwen2ForCausalLM:
    """A model that often says the same."""
    other = make_model(model.config.vocab_size, 0)
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(5)
    for parameter in other.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    return other


def likeliest(ids: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, None]:
    return logits.argmax(-1, keepdim=True), None


def proposed(draft: Draft, text: Sequence[int], count: int) -> list[int]:
    return draft.propose(torch.tensor([list(text)]), count, likeliest).tokens


def expected(model: Any, text: Sequence[int], count: int) -> list[int]:
    """From scratch, token by token, without any cache."""
    ids = list(text)
    for _ in range(count):
        ids.append(
            int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        )
    return ids[len(text) :]


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    return make_model(40, 1)


def test_it_keeps_in_step_with_the_text(model: Qwen2ForCausalLM) -> None:
    draft, text = draft_of(model, 40), [5, 9, 2, 30, 7]
    guess = expected(model, text, 4)
    assert proposed(draft, text, 4) == guess
    ways = [
        [*text, *guess, 3],  # all were right, and one more
        [*text, guess[0], 8],  # the second was wrong
        [*text, guess[0], 8, *range(11, 30)],  # it was not asked for a while
        [*text, guess[0], 8, 11],  # another text that begins alike
        [6],
        [6, 6],
        text,
        text,
    ]
    for way in ways:
        for count in (1, 3):
            assert proposed(draft, way, count) == expected(model, way, count), way


@pytest.mark.parametrize("sizes", [(40, 29), (29, 40)])
def test_vocabularies_of_two_lengths(sizes: tuple[int, int]) -> None:
    """What only one of them has is never proposed, and a text that has it is left alone."""
    has, needs = sizes
    model = make_model(has, 2)
    draft, common = draft_of(model, needs), min(sizes)
    model.lm_head.weight.data[-4:] *= 40  # it would say hardly anything else
    seen = set()
    for first in range(20):
        found = draft.propose(torch.tensor([[first, 3]]), 3, likeliest)
        assert len(found.tokens) == 3
        seen.update(found.tokens)
        logits = model(input_ids=torch.tensor([[first, 3]])).logits[0, -1, :common]
        assert found.tokens[0] == int(logits.argmax())
    assert max(seen) < common
    widths = []

    def note(ids: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, None]:
        widths.append(logits.shape[1])
        return likeliest(ids, logits)

    draft.propose(torch.tensor([[3]]), 1, note)
    assert widths == [needs]  # as wide as the model's own, for processors that index it
    assert len(proposed(draft, [3, has - 1], 2)) == 2
    assert proposed(draft, [3, has], 3) == []


def test_it_ends_with_its_own_context() -> None:
    model = make_model(40, 3, context=24)
    draft = draft_of(model, 40)
    assert len(proposed(draft, [2] * 20, 9)) == 4
    assert proposed(draft, [2] * 24, 9) == []
    assert proposed(draft, [2] * 30, 9) == []
    assert len(proposed(draft, [2] * 5, 9)) == 9


class Dying(Lent):
    """Its feeder dies amid the next pass."""

    def arm(self, model: Any) -> None:
        layer = model.model.layers[1].mlp
        forward = layer.forward

        def die(x: torch.Tensor) -> torch.Tensor:
            layer.forward, self.stays = forward, False
            raise NotLent("gone")

        layer.forward = die


def test_without_its_weights_it_has_no_guess(model: Qwen2ForCausalLM) -> None:
    lent = Dying()
    draft = draft_of(model, 40, lent)
    for text in ([4, 5, 6], [4, 5, 6, 7]):  # amid the first text, and later
        lent.arm(model)
        assert proposed(draft, text, 3) == []
        assert proposed(draft, text, 3) == []
        lent.stays = True
        assert proposed(draft, text, 3) == expected(model, text, 3)


def test_without_memory_it_has_no_guess(model: Qwen2ForCausalLM) -> None:
    draft = draft_of(model, 40)

    def no_room(ids: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, None]:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    assert draft.propose(torch.tensor([[4, 5]]), 3, no_room).tokens == []
    for text in ([4, 5], [6, 7, 8]):
        assert proposed(draft, text, 3) == []  # nor is it asked again, for texts as long as that
    assert proposed(draft, [4], 3) == expected(model, [4], 3)


GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "penalty": {"do_sample": False, "repetition_penalty": 1.6},
    "sampled": {"do_sample": True, "temperature": 1.1, "top_k": 0},
    "cut": {"do_sample": True, "top_k": 6, "top_p": 0.9, "repetition_penalty": 1.2},
    "at least so many": {"do_sample": True, "min_new_tokens": 12},
}


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_text_is_that_of_the_same_seed(model: Qwen2ForCausalLM, name: str) -> None:
    options = GENERATIONS[name] | {"max_new_tokens": 24, "eos_token_id": EOS}
    speculation = Always(5)
    with_draft = loop(speculation, draft_of(nearly(model, 0.002), 40))
    tokens = 0
    for seed in range(7):
        prompt = [seed, 9, 3 * seed]
        without = generate(model, prompt, loop(), seed, **options)
        assert generate(model, prompt, with_draft, seed, seeded=True, **options) == without
        tokens += len(without)
    figures = speculation.figures()
    assert 0.4 * figures["candidates"] < figures["accepted"] < figures["candidates"]
    assert figures["passes"] < 0.6 * tokens


@pytest.mark.parametrize(("asked", "tokens"), [("draft", 120), ("draft", 240), ("lookup", 240)])
def test_guesses_that_are_always_wrong_cost_less_than_a_tenth(asked: str, tokens: int) -> None:
    """Of the whole loop, on a clock that only models move: a pass takes a second and a twentieth more
    for each candidate, a token of the draft a tenth."""
    now, wide = [0.0], 0

    def timed(model: Any, seconds: float, more: float) -> Any:
        def count(_: Any, __: Any, named: dict[str, Any]) -> None:
            nonlocal wide
            now[0] += seconds + more * (named["input_ids"].shape[1] - 1)
            wide += more > 0 and named["input_ids"].shape[1] > 1

        model.register_forward_pre_hook(count, with_kwargs=True)
        return model

    model, draft = timed(make_model(40, 1), 1.0, 0.05), make_model(40, 1)
    draft.lm_head.weight.data *= -1  # what it finds likeliest is what the model never says
    # Nothing follows what it followed before, so that a lookup is always wrong too.
    options = {"do_sample": False, "eos_token_id": None, "no_repeat_ngram_size": 2}
    options["max_new_tokens"] = tokens
    without = generate(model, [5, 9, 2], loop(), **options)
    alone, now[0], wide = now[0], 0.0, 0
    speculation = Speculation(Speculate.parse(asked), clock=lambda: now[0])
    with_draft = loop(speculation, draft_of(timed(draft, 0.1, 0.0), 40))
    assert generate(model, [5, 9, 2], with_draft, **options) == without
    figures = speculation.figures()
    assert figures["accepted"] == 0
    assert wide == 1 + figures["wide_passes"] > 2  # the prompt's is one
    assert now[0] < 1.1 * alone
    assert figures["saved_s"] == pytest.approx(alone - now[0], abs=1e-3)
