"""Texts one after the other, which keep in the KV cache what they share: each is what it is alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from engine.cache import PastLayer, as_argument
from engine.generate import Generator, Sampling, Stopped
from engine.loop import Loop
from engine.text import TokenIds
from tests import speculating
from tests.families import MODELS, theirs

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY = 160
TOKENS = 14
GREEDY = Sampling(greedy=True, max_new_tokens=TOKENS)
SAMPLED = Sampling(temperature=1.5, seed=3, max_new_tokens=TOKENS)


def build(name: str = "mistral without a window", seed: int = 3) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(theirs(MODELS[name]))
    model.generation_config = GenerationConfig(bos_token_id=0, pad_token_id=0)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


def generator(model: Any, loop: Loop) -> Generator:
    return Generator(model, TokenIds(VOCABULARY), GREEDY, True, loop)


def fresh(model: Any, prompt: list[int], sampling: Sampling = GREEDY) -> list[int]:
    """The text in an engine that has seen no other, and looks for no candidates."""
    return list(_fresh(model, tuple(prompt), sampling))


@cache
def _fresh(model: Any, prompt: tuple[int, ...], sampling: Sampling) -> tuple[int, ...]:
    ours = generator(model, speculating.loop())
    return tuple(ours.answer(prompt, _nothing, sampling=sampling).ids)


def _nothing(text: str) -> None:
    pass


@contextmanager
def computed(model: Any) -> Iterator[list[int]]:
    """How many tokens each pass of the model takes."""
    passes: list[int] = []
    handle = model.model.register_forward_hook(
        lambda _, inputs, output: passes.append(output.last_hidden_state.shape[1])
    )
    try:
        yield passes
    finally:
        handle.remove()


class Graphed:
    """Takes single tokens as a step does, and has the next launched before one is read."""

    useful = graphed = True

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, token: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        logits: torch.Tensor = self._model(input_ids=token, **as_argument(cache)).logits[:, -1]
        return logits

    def rest(self) -> None:
        pass


def lookup_loop(model: Any) -> Loop:
    return speculating.loop(speculating.lookup())


def draft_loop(model: Any) -> Loop:
    """The draft is another model: it is nearly always wrong, and what it made up has to go."""
    draft = speculating.draft_of(build(seed=4), VOCABULARY)
    return speculating.loop(speculating.Always(3), draft)


def step_loop(model: Any) -> Loop:
    step: Any = Graphed(model)
    return Loop(step, lambda call, _: call())


LOOPS: dict[str, Callable[[Any], Loop]] = {
    "plain": lambda model: speculating.loop(),
    "lookup": lookup_loop,
    "draft": draft_loop,
    "ahead": step_loop,
}


def prompts(count: int) -> Iterator[tuple[list[int], int | None]]:
    """Conversations that go on, are cut, told otherwise and begun anew; and after how many tokens
    somebody stops the answer. They repeat themselves, so that a lookup finds something."""
    draw = random.Random(5)
    text: list[int] = []
    for _ in range(count):
        stop = draw.choice([None, None, draw.randint(1, TOKENS - 1)])
        match draw.randrange(8):
            case 0:  # from the beginning
                text = [draw.randrange(2, VOCABULARY) for _ in range(draw.randint(1, 9))]
            case 1:  # the end is forgotten
                text = text[: draw.randint(1, len(text))]
            case 2:  # something in the middle is another
                text[draw.randrange(len(text))] = draw.randrange(2, VOCABULARY)
            case 3:  # the oldest is forgotten
                text = text[draw.randrange(len(text)) :]
            case _:  # it goes on
                text = text + [draw.randrange(2, VOCABULARY)] * draw.randint(1, 3) + text[:4]
        text = text[:200] or [7]
        answered = yield list(text), stop
        text = text + (answered or [])


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", LOOPS)
def test_texts_are_those_of_fresh_engines(model: Any, name: str, sampling: Sampling) -> None:
    ours = generator(model, LOOPS[name](model))
    turns = prompts(20)
    prompt, stop = next(turns)
    kept = 0
    while True:
        told: list[int] = []

        def token(told: list[int] = told, stop: int | None = stop) -> None:
            told.append(1)
            if len(told) == stop:
                raise Stopped

        answer = ours.answer(prompt, _nothing, token, sampling, reuse=True)
        assert answer.ids == fresh(model, prompt, sampling)[: len(answer.ids)]
        assert len(answer.ids) == (stop or TOKENS)
        assert 0 <= answer.kept < len(prompt)
        kept += answer.kept
        try:
            prompt, stop = turns.send(answer.ids)  # type: ignore[attr-defined]
        except StopIteration:
            break
    assert kept > 500  # or nothing was tested


@pytest.mark.parametrize("name", ["plain", "lookup"])
def test_a_turn_computes_only_what_is_new(model: Any, name: str) -> None:
    ours = generator(model, LOOPS[name](model))
    first = [5, 17, 120, 2, 9]
    said = ours.answer(first, _nothing, reuse=True)
    assert said.kept == 0
    text = first + said.ids
    with computed(model) as passes:
        again = ours.answer([*text, 8, 8, 3], _nothing, reuse=True)
    # The last token was chosen, and no pass was made over it.
    assert (again.kept, passes[0]) == (len(text) - 1, 4)
    with computed(model) as passes:
        same = ours.answer([*text, 8, 8, 3], _nothing, reuse=True)
    assert (same.kept, passes[0]) == (len(text) + 2, 1) and same.ids == again.ids
    with computed(model) as passes:
        other = ours.answer([*text[:7], 99, 98], _nothing, reuse=True)
    assert (other.kept, passes[0]) == (7, 2)
    with computed(model) as passes:
        alone = ours.answer([*text[:7], 99, 98], _nothing)  # who does not ask gets nothing
    assert (alone.kept, passes[0]) == (0, 9) and alone.ids == other.ids


def test_an_end_that_was_computed_ahead_is_kept(model: Any) -> None:
    """The token that ends a text has been through the model when the next was launched in vain."""
    ours = generator(model, step_loop(model))
    prompt = [5, 17, 120]
    last = fresh(model, prompt)[4]
    model.generation_config = GenerationConfig(bos_token_id=0, pad_token_id=0, eos_token_id=last)
    try:
        ending = generator(model, step_loop(model))
    finally:
        model.generation_config = GenerationConfig(bos_token_id=0, pad_token_id=0)
    said = ending.answer(prompt, _nothing, reuse=True)
    assert said.ended
    text = [*prompt, *said.ids]
    again = ending.answer([*text, 4], _nothing, reuse=True)
    assert again.kept == len(text)
    assert ours.answer([*text, 4], _nothing).ids[: len(again.ids)] == again.ids


def test_a_window_sees_what_was_kept() -> None:
    model = build("mistral")
    window = model.config.sliding_window
    ours = generator(model, speculating.loop())
    text = [(11 * i) % VOCABULARY for i in range(2 * window)]
    for _ in range(4):
        answer = ours.answer(text, _nothing, reuse=True)
        assert answer.ids == fresh(model, text)
        text = [*text, *answer.ids, 5, 6]
    assert answer.kept > 2 * window
    shorter = text[: window + 3]  # behind the window of what is kept
    found = ours.answer(shorter, _nothing, reuse=True)
    assert found.ids == fresh(model, shorter) and found.kept == window + 2


def failing(model: Any, layer: int, call: int) -> Any:
    """Something breaks in a layer, when it has added to the cache."""
    calls: list[int] = []

    def hook(*_: object) -> None:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    return model.model.layers[layer].self_attn.register_forward_hook(hook)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("name", LOOPS)
def test_what_broke_half_way_is_not_kept(model: Any, name: str, layer: int, call: int) -> None:
    ours = generator(model, LOOPS[name](model))
    first = [5, 17, 120, 2, 9] * 2
    said = ours.answer(first, _nothing, reuse=True).ids
    text = [*first, *said, 8, 3]
    handle = failing(model, layer, call)
    try:
        with pytest.raises(KeyboardInterrupt):
            ours.answer(text, _nothing, reuse=True)
    finally:
        handle.remove()
    for prompt in (text, [*first, *said, 9], first):
        answer = ours.answer(prompt, _nothing, reuse=True)
        assert answer.ids == fresh(model, prompt)
        assert answer.kept >= min(len(prompt), len(first) + len(said)) - 1


def test_a_cache_that_finds_no_room_for_both_is_begun_anew(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = generator(model, speculating.loop())
    first = [(7 * i) % VOCABULARY for i in range(240)]
    said = ours.answer(first, _nothing, reuse=True)
    longer = [*first, *said.ids, *range(2, 20)]  # beyond the 256 that there is memory for
    grow = PastLayer.grow
    calls: list[int] = []

    def no_room(self: Any, tokens: int) -> None:
        calls.append(tokens)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 MiB")
        grow(self, tokens)

    monkeypatch.setattr("engine.cache.PastLayer.grow", no_room)
    answer = ours.answer(longer, _nothing, reuse=True)
    assert (answer.kept, len(calls)) == (0, 2)
    assert answer.ids == fresh(model, longer)
    again = ours.answer([*longer, *answer.ids, 3], _nothing, reuse=True)
    assert again.kept == len(longer) + len(answer.ids) - 1
    assert again.ids == fresh(model, [*longer, *answer.ids, 3])
