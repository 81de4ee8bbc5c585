"""Log probabilities are the plain model's, wherever tokens come from, and stand where they belong."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from engine.batch.batch import Batch
from engine.batch.passes import Passes
from engine.generate import Answer, Generator, Sampling, Stopped
from engine.logprobs import Logprob, Logprobs
from engine.loop import Loop
from engine.pieces import Pieces
from engine.serve.jobs import Ended, Event, Job, Piece, Placed, Telling
from engine.serve.spelling import LEAST, chat_logprobs, completion_logprobs
from engine.text import TokenIds
from engine.token_bytes import TokenBytes
from tests import speculating
from tests.batching import Owner
from tests.families import MODELS, theirs
from tests.processes import DEMO

VOCABULARY = 160
PROMPT = [5, 17, 120, 2, 5, 17, 120, 2, 5]
SAMPLINGS = {
    "greedy": Sampling(greedy=True, max_new_tokens=12),
    "sampled": Sampling(
        temperature=0.3, top_p=0.9, repetition_penalty=2.0, seed=4, max_new_tokens=12
    ),
}


@cache
def model() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        found: Any = AutoModelForCausalLM.from_config(theirs(MODELS["mistral without a window"]))
    found.generation_config = GenerationConfig(bos_token_id=0, pad_token_id=0)
    return found.eval()


def generator(loop: Loop) -> Generator:
    return Generator(model(), TokenIds(VOCABULARY), Sampling(), True, loop)


def check(ids: list[int], told: list[Logprob], count: int) -> None:
    """``told`` of an answer to PROMPT is what transformers' own logits say."""
    assert [one.token for one in told] == ids
    with torch.inference_mode():
        logits = model()(torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1]
    expected = torch.log_softmax(logits.float(), -1)
    for one, row in zip(told, expected, strict=True):
        assert one.value == pytest.approx(row[one.token].item(), abs=1e-4)
        values, tokens = row.topk(count)
        assert [token for token, _ in one.top] == tokens.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-4)


LOOPS: dict[str, Callable[[], Loop]] = {
    "plain": speculating.loop,
    "lookup": lambda: speculating.loop(speculating.lookup()),
    "draft": lambda: speculating.loop(
        speculating.Always(3), speculating.draft_of(model(), VOCABULARY)
    ),
}


@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", LOOPS)
def test_of_one_answer(name: str, sampling: str, count: int) -> None:
    told: list[Logprob] = []
    ours = generator(LOOPS[name]())
    logprobs = Logprobs(count, told.append)
    answer = ours.answer(PROMPT, lambda _: None, sampling=SAMPLINGS[sampling], logprobs=logprobs)
    check(answer.ids, told, count)
    assert answer.ids == ours.answer(PROMPT, lambda _: None, sampling=SAMPLINGS[sampling]).ids


class Measuring(Owner):
    """Wants to know how likely its tokens were."""

    def __init__(self, generator: Generator, sampling: Sampling) -> None:
        super().__init__(generator, PROMPT, sampling)
        self.told: list[Logprob] = []
        self._make = lambda: generator.request(
            PROMPT, lambda _: None, sampling=sampling, logprobs=Logprobs(3, self.told.append)
        )


def test_in_a_batch() -> None:
    class Roomy:
        def chunk(self, tokens: int, capacity: int = 0) -> int | None:
            return None

        def fits(self, *figures: object) -> bool:
            return True

    ours = generator(speculating.loop())
    batch = Batch(model(), Passes(model()), Roomy(), 4)
    measuring = [Measuring(ours, sampling) for sampling in SAMPLINGS.values()]
    for owner in (measuring[0], Owner(ours, [9], SAMPLINGS["greedy"]), measuring[1]):
        batch.add(owner)
    while not batch.idle:
        batch.turn()
    for one in measuring:
        check(one.ids, one.told, 3)


class Nobody:
    """Watches jobs, and does nothing."""

    def begin(self, job: Job) -> None: ...

    def token(self, job: Job, first: bool) -> None: ...

    def done(self, job: Job, answer: Answer) -> None: ...

    def failed(self, job: Job) -> None: ...


def pieces(tokens: list[int], stops: list[str]) -> list[Piece]:
    """What a client is told of an answer whose tokens are bytes, each less likely than the last."""
    events: list[Event] = []
    telling = Telling(Job([1], Sampling(), tuple(stops), events.append, 0), Nobody())
    assert telling.logprobs is not None
    parts = Pieces(lambda ids: bytes(ids).decode("utf-8", "replace"))
    answer = Answer()
    try:
        for number, token in enumerate(tokens):
            answer.ids.append(token)
            telling.logprobs.told(token, [-float(number)])
            telling.token()
            if text := parts.add(token):
                telling.write(text)
        if text := parts.end():
            telling.write(text)
    except Stopped:
        pass
    telling.done(answer)
    assert isinstance(events.pop(), Ended)
    assert all(isinstance(event, Piece) for event in events)
    return [event for event in events if isinstance(event, Piece)]


TEXTS = st.text(st.sampled_from("ab\u00e9\u20ac\U0001f40b"), max_size=12)


@given(TEXTS, st.lists(TEXTS.filter(bool), max_size=2))
def test_every_token_comes_with_the_piece_it_begins_in(text: str, stops: list[str]) -> None:
    found = pieces(list(text.encode()), stops)
    told = "".join(piece.text for piece in found)
    at, tokens = 0, []
    for piece in found:
        assert piece.logprobs  # a piece is text, and that comes from tokens
        for offset, logprob in piece.logprobs:
            assert at <= offset < at + len(piece.text)
            assert logprob.value == -len(tokens)
            tokens.append(logprob.token)
        at += len(piece.text)
    assert bytes(tokens) == told.encode()  # all of them, and none of what a stop string cut off


@pytest.fixture(scope="module")
def demo() -> Any:
    return AutoTokenizer.from_pretrained(DEMO, local_files_only=True)


def test_bytes_of_a_vocabulary_of_bytes(demo: Any) -> None:
    spell = TokenBytes(demo)
    text = "1.1 + 2.3 = \u20ac\u00e9\n\t\U0001f40b\x00write"
    ids = demo(text + "<|im_end|>").input_ids
    assert b"".join(map(spell, ids)) == (text + "<|im_end|>").encode()
    assert len(ids) > len(text) and spell(10**6) == b""


def test_bytes_of_a_vocabulary_of_words() -> None:
    """As Llama 2 and Mistral have it: spaces as signs, other bytes by number."""
    words = ["<unk>", "<s>", "<0xE2>", "<0x82>", "<0xAC>", "\u2581the", "\u2581", "cat", "a"]
    backend = Tokenizer(
        models.BPE({word: n for n, word in enumerate(words)}, [], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    spell = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))
    expected = [b"<unk>", b"<s>", b"\xe2", b"\x82", b"\xac", b" the", b" ", b"cat", b"a"]
    assert [spell(token) for token in range(len(words))] == expected


def test_both_forms() -> None:
    spelled = {1: b"a", 2: "\u20ac".encode(), 3: b"\xe2", 4: b"\x82"}
    placed = [
        Placed(0, Logprob(1, -0.5, ((2, -0.25), (1, -0.5)))),
        Placed(1, Logprob(3, -float("inf"), ((1, -0.125), (4, -2.0)))),
    ]
    assert chat_logprobs(placed, spelled.__getitem__) == {
        "content": [
            {
                "token": "a", "logprob": -0.5, "bytes": [97],
                "top_logprobs": [
                    {"token": "\u20ac", "logprob": -0.25, "bytes": [226, 130, 172]},
                    {"token": "a", "logprob": -0.5, "bytes": [97]},
                ],
            },
            {
                "token": "\ufffd", "logprob": LEAST, "bytes": [226],
                "top_logprobs": [
                    {"token": "a", "logprob": -0.125, "bytes": [97]},
                    {"token": "\ufffd", "logprob": -2.0, "bytes": [130]},
                ],
            },
        ],
        "refusal": None,
    }  # fmt: skip
    assert completion_logprobs(placed, spelled.__getitem__) == {
        "tokens": ["a", "bytes:\\xe2"],
        "token_logprobs": [-0.5, LEAST],
        "top_logprobs": [
            {"\u20ac": -0.25, "a": -0.5},
            {"a": -0.125, "bytes:\\x82": -2.0, "bytes:\\xe2": LEAST},
        ],
        "text_offset": [0, 1],
    }
    assert chat_logprobs([], spelled.__getitem__) == {"content": [], "refusal": None}
    assert completion_logprobs([], spelled.__getitem__) == {
        "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
    }  # fmt: skip
