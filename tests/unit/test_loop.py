"""The decoding loop chooses the tokens that transformers' own loop chooses, also when it runs ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, Qwen2ForCausalLM, set_seed

from engine.cache import as_argument
from engine.generate import Generator, Sampling
from engine.loop import Loop
from engine.text import TokenIds
from tests.checkpoints import make_checkpoint
from tests.speculating import Watched, lookup

PROMPT = [5, 17, 300, 2]
TOKENS = 24

GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 50},
    "penalty": {"do_sample": False, "repetition_penalty": 3.0},
    "sampled, penalty": {"do_sample": True, "top_k": 0, "repetition_penalty": 1.5},
    "one token": {"do_sample": False, "max_new_tokens": 1},
    "at least so many": {"do_sample": True, "min_new_tokens": 20, "eos_token_id": [*range(150)]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Qwen2ForCausalLM:
    path = make_checkpoint(tmp_path_factory.mktemp("loop") / "model", seed=6)
    return Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


class Eager:
    """Takes single tokens as a step does, by the model itself; ``graphed``: invites to run ahead."""

    useful, most = True, 16

    def __init__(self, model: Any, graphed: Iterator[bool]) -> None:
        self._model, self._graphed = model, graphed
        self.lengths: list[int] = []
        self.resting = False

    @property
    def graphed(self) -> bool:
        return next(self._graphed)

    def __call__(self, token: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        self.resting = False
        self.lengths.append(cache.get_seq_length())
        output = self._model(input_ids=token, **as_argument(cache), use_cache=True)
        return output.logits[:, -1]

    def several(self, tokens: torch.Tensor, cache: DynamicCache) -> list[torch.Tensor]:
        return [self(token, cache).clone() for token in tokens.split(1, dim=1)]

    def rest(self) -> None:
        self.resting = True


def never() -> Iterator[bool]:
    while True:
        yield False


def always() -> Iterator[bool]:
    while True:
        yield True


def now_and_then() -> Iterator[bool]:
    while True:
        yield from (True, True, False)


def generate(model: Any, loop: Loop, prompt: list[int], **words: Any) -> list[int]:
    """What the loop generates; what it hands out token by token is the same."""
    config = GenerationConfig(**{"max_new_tokens": TOKENS, "pad_token_id": 0} | words)
    handed: list[int] = []
    put = lambda token: handed.extend(token.tolist())  # noqa: E731
    set_seed(4)
    ids = torch.tensor([prompt])
    found = model.generate(ids, generation_config=config, custom_generate=partial(loop, put=put))
    assert found[0, : len(prompt)].tolist() == prompt
    assert handed == found[0, len(prompt) : len(prompt) + len(handed)].tolist()
    return handed


def expected(model: Any, prompt: list[int], **words: Any) -> list[int]:
    config = GenerationConfig(**{"max_new_tokens": TOKENS, "pad_token_id": 0} | words)
    set_seed(4)
    found = model.generate(torch.tensor([prompt]), generation_config=config)
    return found[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def loop_for(model: Any, ahead: Any) -> tuple[Loop, Eager | None]:
    step = None if ahead is None else Eager(model, ahead())
    return Loop(step, lambda call, _: call()), step  # type: ignore[arg-type]


@pytest.mark.parametrize("ahead", [None, never, always, now_and_then])
@pytest.mark.parametrize("name", GENERATIONS)
def test_text_is_that_of_transformers(model: Qwen2ForCausalLM, name: str, ahead: Any) -> None:
    words = GENERATIONS[name]
    wanted = expected(model, PROMPT, **words)
    loop, step = loop_for(model, ahead)
    for _ in range(2):  # the cache's memory serves again
        assert generate(model, loop, PROMPT, **words) == wanted
    assert step is None or step.resting or not step.lengths


@pytest.mark.parametrize("ahead", [None, never, always, now_and_then])
def test_it_ends_at_the_end_of_the_text(model: Qwen2ForCausalLM, ahead: Any) -> None:
    whole = expected(model, PROMPT, do_sample=True)
    loop, step = loop_for(model, ahead)
    for at in (0, 1, 7, TOKENS - 1):
        last = whole[at]
        assert (
            generate(model, loop, PROMPT, do_sample=True, eos_token_id=[last])
            == (whole[: whole.index(last) + 1])
        )
        other = [9, 9, 3]  # what was launched in vain is forgotten
        assert generate(model, loop, other, do_sample=False) == (
            expected(model, other, do_sample=False)
        )
    assert step is None or step.resting


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_nothing_is_launched_beyond_the_last_token(model: Qwen2ForCausalLM, tokens: int) -> None:
    loop, step = loop_for(model, always)
    assert step is not None
    assert len(generate(model, loop, PROMPT, max_new_tokens=tokens, do_sample=False)) == tokens
    assert step.lengths == [len(PROMPT) + index for index in range(tokens - 1)]


@pytest.mark.parametrize("most", [16, 4, 1])
def test_candidates_take_the_step_if_it_takes_so_many(model: Qwen2ForCausalLM, most: int) -> None:
    """And the model's own pass if not; the text is the same, and so are the places of its tokens."""
    step, prompt = Eager(model, never()), PROMPT * 3
    step.most = most
    watched = Watched("lookup:7")
    loop = Loop(step, lambda call, _: call(), watched)  # type: ignore[arg-type]
    options = {"do_sample": False, "max_new_tokens": 60, "repetition_penalty": 0.5}
    assert generate(model, loop, prompt, **options) == expected(model, prompt, **options)
    lengths, at, wide = [], len(prompt), 0
    for candidates, came in watched.passes:
        width = 1 + len(candidates)
        if width == 1 or width <= most:
            lengths += range(at, at + width)
        wide += width > 4
        at += len(came)
    assert step.lengths == lengths
    assert wide > 3 and watched.figures()["accepted"] > 0
    assert step.resting


def test_a_pass_over_candidates_is_made_again_when_memory_was_short(
    model: Qwen2ForCausalLM,
) -> None:
    """And before that the step gives back what it holds."""
    failures = 0

    class Short(Eager):
        def several(self, tokens: torch.Tensor, cache: DynamicCache) -> list[torch.Tensor]:
            nonlocal failures
            if not self.resting:
                failures += 1
                raise torch.OutOfMemoryError("Tried to allocate 2.00 MiB")
            return super().several(tokens, cache)

    def survive(call: Callable[[], Any], _: Any) -> Any:
        with suppress(torch.OutOfMemoryError):
            return call()
        return call()

    loop = Loop(Short(model, never()), survive, lookup("lookup:7"))  # type: ignore[arg-type]
    options = {"do_sample": False, "max_new_tokens": 40, "repetition_penalty": 0.5}
    prompt = PROMPT * 3
    assert generate(model, loop, prompt, **options) == expected(model, prompt, **options)
    assert failures > 0


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_a_prompt_in_pieces(model: Qwen2ForCausalLM, chunk: int) -> None:
    prompt = torch.randint(320, (10,), generator=torch.Generator().manual_seed(1)).tolist()
    loop, _ = loop_for(model, None)
    found = generate(model, loop, prompt, do_sample=False, prefill_chunk_size=chunk)
    assert found == expected(model, prompt, do_sample=False)


def test_the_cache_grows_as_the_text_does(model: Qwen2ForCausalLM) -> None:
    """Beyond the 256 tokens that it has room for at first."""
    prompt = torch.randint(320, (250,), generator=torch.Generator().manual_seed(2)).tolist()
    words = {"do_sample": True, "max_new_tokens": 20}
    for ahead in (None, always):
        loop, _ = loop_for(model, ahead)
        assert generate(model, loop, prompt, **words) == expected(model, prompt, **words)


def test_a_choice_that_is_made_again_draws_the_same(model: Qwen2ForCausalLM) -> None:
    """Memory runs out each time when the token has been drawn."""
    failures = 0

    def no_room(*_: Any, **__: Any) -> torch.Tensor:
        nonlocal failures
        failures += 1
        raise torch.OutOfMemoryError("Tried to allocate 2.00 MiB")

    def survive(call: Callable[[], Any], _: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch, suppress(torch.OutOfMemoryError):
            patch.setattr(torch, "cat", no_room)
            return call()
        return call()

    wanted = expected(model, PROMPT, do_sample=True)
    assert generate(model, Loop(None, survive), PROMPT, do_sample=True) == wanted
    assert failures == TOKENS


def test_only_a_seed_asks_for_its_draws(model: Qwen2ForCausalLM) -> None:
    """Who gives none gets draws that nobody had before, and may get them by another rule."""
    seeded: list[bool] = []

    class Noting(Loop):
        def __call__(self, *values: Any, **named: Any) -> torch.Tensor:
            seeded.append(named["seeded"])
            return super().__call__(*values, **named)

    loop = Noting(None, lambda call, _: call())
    generator = Generator(model, TokenIds(320), Sampling(), True, loop)

    def answer(seed: int | None) -> tuple[int, ...]:
        set_seed(4)
        sampling = Sampling(max_new_tokens=TOKENS, temperature=1.5, seed=seed)
        return tuple(generator.answer(PROMPT, lambda text: None, sampling=sampling).ids)

    assert len({answer(seed) for seed in (None, None, 7, 7)}) == 3
    assert seeded == [False, False, True, True]
