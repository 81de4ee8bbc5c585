"""Sequences that share passes: whoever else is in, each gets the tokens that it gets alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, set_seed

from common.errors import MemoryShortageError, UsageError, WeightFeederError
from engine.batch.attention import Part
from engine.batch.batch import Batch
from engine.batch.passes import Passes
from engine.cache import as_argument, make_cache, windows_of
from engine.generate import Answer, Generator, Request, Sampling, Stopped
from engine.loop import Loop
from engine.serve.jobs import Busy, Ended, Ending, Event, Failed, Job, Piece
from engine.serve.together import Together
from engine.text import TokenIds

VOCABULARY = 700
LONGEST = 16
PROMPTS = [[5, 17, 300, 2], [9], [*range(40, 77)], [1, 2], [699] * 12, [8, 1], [77, 5, 3], [4]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For many small tensors: threads of torch's would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(family: str = "Qwen2", **changes: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(
        **{
            "hidden_size": 88, "intermediate_size": 212, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
            "max_position_embeddings": 512, "eos_token_id": None, "bos_token_id": 0,
            "initializer_range": 0.2, "tie_word_embeddings": False,
        } | changes
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.generation_config = GenerationConfig(bos_token_id=0, pad_token_id=0)
    return model


class Roomy:
    """Room for everything."""

    def chunk(self, tokens: int, capacity: int = 0) -> int | None:
        return None

    def fits(self, tokens: int, rows: int, sequences: int, piece: tuple[int, int] = (0, 0)) -> bool:
        return True


@cache
def shared() -> tuple[Any, Generator, Passes]:
    model = build()
    generator = Generator(
        model, TokenIds(VOCABULARY), Sampling(), True, Loop(None, lambda call, _: call())
    )
    return model, generator, Passes(model)


def expected(prompt: list[int], count: int, seed: int | None = None, **words: Any) -> list[int]:
    """What transformers' own loop makes of a prompt that is alone."""
    return list(_expected(tuple(prompt), count, seed, tuple(sorted(words.items()))))


@cache
def _expected(
    prompt: tuple[int, ...], count: int, seed: int | None, words: tuple[tuple[str, Any], ...]
) -> tuple[int, ...]:
    model: Any = shared()[0]
    config = GenerationConfig(max_new_tokens=count, pad_token_id=0, **dict(words))
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            set_seed(seed)
        found = model.generate(torch.tensor([prompt]), generation_config=config)
    return tuple(found[0, len(prompt) :].tolist())


@dataclass
class Asker:
    """Wants one answer. ``leave``: after so many tokens it does not any more."""

    prompt: list[int]
    sampling: Sampling
    leave: int | None = None
    raises: bool = False
    tokens: int = 0
    text: str = ""
    answer: Answer | None = None
    error: WeightFeederError | None = None
    wanted: bool = True

    def request(self) -> Request:
        return shared()[1].request(self.prompt, self._write, self._token, self.sampling)

    def done(self, answer: Answer) -> None:
        self.answer = answer

    def failed(self, error: WeightFeederError) -> None:
        self.error = error

    def _write(self, text: str) -> None:
        self.text += text

    def _token(self) -> None:
        self.tokens += 1
        if self.tokens == self.leave:
            if self.raises:
                raise Stopped
            self.wanted = False

    @property
    def ids(self) -> list[int]:
        assert self.answer is not None
        return self.answer.ids


def greedy(index: int, count: int = LONGEST, **more: Any) -> Asker:
    return Asker(PROMPTS[index], Sampling(max_new_tokens=count, greedy=True), **more)


def run(batch: Batch, *askers: Asker) -> None:
    for asker in askers:
        batch.add(asker)
    while not batch.idle:
        batch.turn()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(PROMPTS) - 1), st.integers(1, LONGEST), st.integers(0, 12),
            st.one_of(st.none(), st.integers(1, LONGEST)), st.booleans(),
        ),
        min_size=1, max_size=8,
    ),
    st.integers(1, 5),
)  # fmt: skip
def test_every_company(asked: list[tuple[int, int, int, int | None, bool]], most: int) -> None:
    """Requests join between any two passes, end at any length, and leave in the middle."""
    batch = Batch(shared()[0], shared()[2], Roomy(), most)
    askers = [greedy(i, count, leave=leave, raises=how) for i, count, _, leave, how in asked]
    joins = [at for _, _, at, _, _ in asked]
    turn = 0
    while turn <= max(joins) or not batch.idle:
        for asker, at in zip(askers, joins, strict=True):
            if at == turn:
                batch.add(asker)
        batch.turn()
        assert batch.running <= most
        turn += 1
        assert turn < 13 + sum(count + 1 for _, count, _, _, _ in asked)  # everybody gets on
    for asker, (_, count, _, leave, _) in zip(askers, asked, strict=True):
        whole = expected(asker.prompt, LONGEST, do_sample=False)
        assert asker.ids == whole[: min(count, leave or count)]
        if asker.wanted and not (leave and leave <= count):
            assert asker.text.split() == [str(token) for token in asker.ids]


def test_one_pass_serves_all() -> None:
    batch = Batch(shared()[0], shared()[2], Roomy(), 8)
    run(batch, *[greedy(index) for index in range(8)])
    assert batch.passes == LONGEST


@pytest.mark.parametrize(
    "words",
    [
        {"temperature": 1.3, "top_p": 0.9, "top_k": 40},
        {"temperature": 0.7, "top_k": 0, "repetition_penalty": 1.5},
    ],
)
def test_a_seed_gives_the_same_text_in_company(words: dict[str, Any]) -> None:
    askers = [
        Asker(prompt, Sampling(max_new_tokens=12, seed=seed, **words))
        for seed, prompt in enumerate([*PROMPTS, PROMPTS[0]])
    ]
    run(Batch(shared()[0], shared()[2], Roomy(), 4), greedy(3), *askers, greedy(2))
    for seed, asker in enumerate(askers):
        assert asker.ids == expected(asker.prompt, 12, seed, do_sample=True, **words)
    assert askers[0].ids != askers[-1].ids


class Eager:
    """Takes the tokens of a sequence that is alone as a step does, by the model itself; ``graphed``, so
    that tokens are launched ahead."""

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.lengths: list[int] = []
        self.graphed = False

    packed = False  # the kernels for several are none for the CPU

    @property
    def useful(self) -> bool:
        """While a sequence is alone."""
        return self.batch is not None and self.batch.running == 1

    def __call__(self, token: torch.Tensor, kept: Any) -> torch.Tensor:
        self.lengths.append(kept.get_seq_length())
        self.graphed = True
        output = shared()[0](input_ids=token, **as_argument(kept), use_cache=True)
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def rest(self) -> None:
        self.graphed = False


@pytest.mark.parametrize("joins", [None, 1, 2, 5, 9, 14])
def test_tokens_launched_ahead(joins: int | None) -> None:
    """By one that is alone; another joins after so many turns and leaves after some."""
    step: Any = Eager()
    batch = Batch(shared()[0], Passes(shared()[0], step), Roomy(), 2)
    step.batch = batch
    whole = expected(PROMPTS[0], LONGEST, do_sample=False)
    first, second = greedy(0), greedy(1, 3)
    sampling = Sampling(max_new_tokens=9, seed=2, temperature=1.0)
    third = Asker(PROMPTS[2], sampling, leave=4, raises=bool(joins and joins % 2))
    batch.add(first)
    for turn in range(60):
        if turn == joins:
            batch.add(second)
        batch.turn()
    assert first.ids == whole
    if joins is None:
        # One pass for each token but the first, and none in vain.
        assert step.lengths == [len(PROMPTS[0]) + made for made in range(LONGEST - 1)]
    else:
        assert second.ids == expected(PROMPTS[1], LONGEST, do_sample=False)[:3]
    run(batch, third)
    assert third.ids == expected(third.prompt, 9, 2, do_sample=True, temperature=1.0)[:4]
    last = greedy(3)
    run(batch, last)  # what was launched in vain is forgotten
    assert last.ids == expected(PROMPTS[3], LONGEST, do_sample=False)


def test_the_end_of_a_text() -> None:
    whole = expected(PROMPTS[0], LONGEST, do_sample=False)
    last = whole[9]
    generation = shared()[1]._original
    asker, others = greedy(0), [greedy(1), greedy(2)]
    generation["eos_token_id"] = last
    try:
        run(Batch(shared()[0], shared()[2], Roomy(), 3), others[0], asker, others[1])
    finally:
        generation["eos_token_id"] = None
    assert asker.ids == whole[: whole.index(last) + 1]
    assert asker.answer is not None and asker.answer.ended
    for other in others:
        assert other.ids == expected(other.prompt, LONGEST, do_sample=False, eos_token_id=last)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 256, "intermediate_size": 1030, "max_position_embeddings": 64},
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        {"family": "Qwen3", "head_dim": 32},
        {"family": "Mistral", "sliding_window": 5},
    ],
    ids=["wide", "sliding window", "qwen3", "mistral"],
)  # fmt: skip
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_a_sequence_alone(changes: dict[str, Any], attention: str) -> None:
    """To the bit, also of prompts that are taken in pieces, amid others that decode."""
    if "hidden_size" in changes:
        torch.set_num_threads(2)  # which share the work of so much
    model = build(**changes)
    model.config._attn_implementation = attention
    schedule = [([3, 5, 1], 0), ([1, 1, 1, 1], 1), ([7, 20, 1], 0), ([1] * 5, 2)]  # rows, delay
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(VOCABULARY, (40,), generator=generator).tolist() for _ in schedule]

    def parts(index: int, kept: Any) -> list[Part]:
        rows, at, made = schedule[index][0], 0, []
        for count in rows:
            made.append(Part(tuple(texts[index][at : at + count]), at, kept))
            at += count
        return made

    alone = []
    for index in range(len(schedule)):
        kept = make_cache(2, 1, windows=windows_of(model.config))
        with torch.no_grad():
            alone.append([
                model(
                    input_ids=torch.tensor([part.ids]), **as_argument(kept), use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
                for part in parts(index, kept)
            ])  # fmt: skip
    passes = Passes(model)
    todo = [
        parts(index, make_cache(2, 1, windows=windows_of(model.config)))
        for index in range(len(schedule))
    ]
    found: list[list[torch.Tensor]] = [[] for _ in schedule]
    for turn in range(10):
        now = [i for i, (_, delay) in enumerate(schedule) if delay <= turn and todo[i]]
        if now:
            rows = passes([todo[i].pop(0) for i in now])
            for i, row in zip(now, rows, strict=True):
                found[i].append(row)
    for one, other in zip(alone, found, strict=True):
        assert len(one) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert model.config._attn_implementation == attention
    torch.set_num_threads(1)


# Memory ---------------------------------------------------------------------------------------


class Tight(Roomy):
    """Never room for one more beside ``most``, whatever they need."""

    def __init__(self, most: int) -> None:
        self.most = most

    def fits(self, tokens: int, rows: int, sequences: int, piece: tuple[int, int] = (0, 0)) -> bool:
        return sequences <= self.most


def test_who_finds_no_room_waits() -> None:
    batch = Batch(shared()[0], shared()[2], Tight(2), 8)
    askers = [greedy(index, 5) for index in range(5)]
    for asker in askers:
        batch.add(asker)
    batch.turn()
    assert batch.running == 2 and [asker.tokens for asker in askers] == [1, 1, 0, 0, 0]
    run(batch)
    for asker in askers:
        assert asker.ids == expected(asker.prompt, LONGEST, do_sample=False)[:5]


def test_room_is_counted_for_all_that_join() -> None:
    """Also for those whose caches are not there yet."""

    class Counting(Roomy):
        def fits(
            self, tokens: int, rows: int, sequences: int, piece: tuple[int, int] = (0, 0)
        ) -> bool:
            return tokens <= 3 * 256

    batch = Batch(shared()[0], shared()[2], Counting(), 8)
    askers = [greedy(index, 5) for index in range(6)]
    for asker in askers:
        batch.add(asker)
    batch.turn()
    assert batch.running == 3
    batch.turn()  # and now those have theirs
    assert batch.running == 6
    run(batch)
    assert [len(asker.ids) for asker in askers] == [5] * 6


class Short:
    """Passes that run out of memory now and then, having done half of their work."""

    graphed = False

    def __init__(self, most: int) -> None:
        self.most, self.failures = most, 0
        self._passes = shared()[2]

    def begins(self) -> None:
        pass

    def __call__(self, parts: list[Part]) -> list[torch.Tensor]:
        self.begins()
        found = self._passes(parts)
        if len(parts) > self.most:
            self.failures += 1
            raise MemoryShortageError("short")
        return found

    def rest(self) -> None:
        pass

    def restfully(self, call: Any, cache: Any = None) -> Any:
        return call()


def test_who_leaves_leaves_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what went wrong holds none of it, nor what the failed pass held."""
    passes: Any = Short(3)
    batch = Batch(shared()[0], passes, Tight(3), 8)
    askers = [greedy(index, 8) for index in range(3)]
    for asker in askers:
        batch.add(asker)
    batch.turn()
    memory = batch._running[-1].cache.layers[0].memory  # type: ignore[union-attr]
    kept, alive = weakref.ref(memory[0]), []
    del memory
    monkeypatch.setattr(Short, "begins", lambda self: alive.append(kept() is not None))
    passes.most = 2
    gc.disable()
    try:
        batch.turn()
    finally:
        gc.enable()
    assert (batch.running, alive) == (2, [True, False])
    run(batch)
    assert all(asker.answer is not None for asker in askers)


def test_memory_of_who_has_left_is_not_kept_from_others() -> None:
    """Only who comes next when nobody is in gets it, and it counts for what it is."""
    told: list[tuple[int, int]] = []

    class Asked(Roomy):
        def chunk(self, tokens: int, capacity: int = 0) -> int | None:
            told.append((tokens, capacity))
            return None

    batch = Batch(shared()[0], shared()[2], Asked(), 8)
    first, second = greedy(0, 9), greedy(2, 2)
    batch.add(first)
    batch.add(second)
    batch.turn()
    memory = batch._running[1].cache.layers[0].memory  # type: ignore[union-attr]
    left = weakref.ref(memory[0])
    del memory
    while second.answer is None:
        batch.turn()
    gc.collect()
    assert batch.running == 1 and left() is None
    run(batch)
    run(batch, greedy(1, 2))
    assert told == [(4, 0), (1, 256)]


class Choosing:
    """Runs out of memory at some choices, after the draw, and once more where it is tried again."""

    graphed = False

    def __init__(self, *fails: int) -> None:
        self.fails, self.made, self.rows = set(fails), 0, list[int]()

    def __call__(self, parts: list[Part]) -> list[torch.Tensor]:
        self.rows.append(sum(len(part.ids) for part in parts))
        return shared()[2](parts)

    def rest(self) -> None:
        pass

    def restfully(self, call: Any, cache: Any = None) -> Any:
        self.made += 1
        if self.made not in self.fails:
            return call()
        whole = torch.cat
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "cat", no_room)
            with pytest.raises(torch.OutOfMemoryError):
                call()
        assert torch.cat is whole
        return no_room()


def no_room(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")


@pytest.mark.parametrize("company", [True, False])
def test_no_memory_for_a_choice(company: bool) -> None:
    """In company it waits, and goes on with the draws that it would have made."""
    passes: Any = Choosing(5 if company else 3)
    batch = Batch(shared()[0], passes, Tight(2), 8)
    sampled = Asker(PROMPTS[0], Sampling(max_new_tokens=8, seed=5, temperature=1.0))
    other = greedy(1, 8)
    run(batch, sampled, *[other] * company)
    if company:
        assert sampled.ids == expected(PROMPTS[0], 8, 5, do_sample=True, temperature=1.0)
        assert other.ids == expected(PROMPTS[1], LONGEST, do_sample=False)[:8]
    else:
        assert isinstance(sampled.error, MemoryShortageError)
        assert sampled.error.__traceback__ is None


def test_no_memory_for_a_request() -> None:
    """It fails alone."""
    batch = Batch(shared()[0], shared()[2], Roomy(), 8)
    good, bad = greedy(0), greedy(1)
    bad.request = no_room  # type: ignore[method-assign]
    run(batch, good, bad)
    assert isinstance(bad.error, MemoryShortageError)
    assert good.ids == expected(good.prompt, LONGEST, do_sample=False)


def test_long_prompts_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that come while another is in pieces: no pass takes many more rows than it may."""
    monkeypatch.setattr("engine.batch.batch.MOST_ROWS", 10)
    passes: Any = Choosing()
    pieces: list[tuple[int, int]] = []

    class Asked(Roomy):
        def fits(
            self, tokens: int, rows: int, sequences: int, piece: tuple[int, int] = (0, 0)
        ) -> bool:
            pieces.append(piece)
            return True

    batch = Batch(shared()[0], passes, Asked(), 8)
    askers = [greedy(2, LONGEST) for _ in range(3)]
    for asker in askers:
        batch.add(asker)
        batch.turn()
    run(batch)
    assert max(passes.rows) <= 10 + 2 and passes.rows[:4] == [10, 10, 10, 7]
    assert pieces and set(pieces) == {(10, 37)}
    for asker in askers:
        assert asker.ids == expected(asker.prompt, LONGEST, do_sample=False)


def test_who_came_last_waits_when_memory_runs_out() -> None:
    passes: Any = Short(3)
    batch = Batch(shared()[0], passes, Tight(3), 8)
    askers = [greedy(index, 8) for index in range(3)]
    sampled = Asker(PROMPTS[6], Sampling(max_new_tokens=8, seed=5, temperature=1.0))
    for asker in [*askers, sampled]:
        batch.add(asker)
    for _ in range(3):
        batch.turn()
    passes.most = 1  # from here on
    run(batch)
    assert passes.failures > 0
    for asker in askers:
        assert asker.ids == expected(asker.prompt, LONGEST, do_sample=False)[:8]
    wanted = expected(sampled.prompt, 8, 5, do_sample=True, temperature=1.0)
    assert sampled.ids == wanted  # it goes on with its own random numbers


def test_one_that_does_not_fit_alone_fails_alone() -> None:
    passes: Any = Short(0)
    batch = Batch(shared()[0], passes, Roomy(), 2)
    askers = [greedy(0), greedy(1)]
    run(batch, *askers)
    assert all(isinstance(asker.error, MemoryShortageError) for asker in askers)
    passes.most = 2
    after = greedy(2)
    run(batch, after)
    assert after.ids == expected(after.prompt, LONGEST, do_sample=False)


def test_long_prompts_ride_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.batch.batch.MOST_ROWS", 10)
    batch = Batch(shared()[0], shared()[2], Roomy(), 4)
    first = greedy(0)
    batch.add(first)
    batch.turn()
    long = greedy(2)  # of 37 tokens
    batch.add(long)
    for turn in range(4):
        batch.turn()
        assert first.tokens == 2 + turn and long.tokens == (turn == 3)
    run(batch)
    assert first.ids == expected(first.prompt, LONGEST, do_sample=False)


def test_a_request_that_cannot_be_answered() -> None:
    batch = Batch(shared()[0], shared()[2], Roomy(), 2)
    none, good = Asker([], Sampling()), greedy(1)
    run(batch, none, good)
    assert isinstance(none.error, UsageError)
    assert good.ids == expected(good.prompt, LONGEST, do_sample=False)


# Jobs ------------------------------------------------------------------------------------------


class Watching:
    """Counts."""

    def __init__(self) -> None:
        self.begun = self.tokens = self.over = 0

    def begin(self, job: Job) -> None:
        self.begun += 1

    def token(self, job: Job, first: bool) -> None:
        self.tokens += 1

    def done(self, job: Job, answer: Answer) -> None:
        self.over += 1

    def failed(self, job: Job) -> None:
        self.over += 1


class Desk:
    """Jobs, and what was told of each."""

    def __init__(self, limit: int, most: int = 2) -> None:
        self.watching = Watching()
        batch = Batch(shared()[0], shared()[2], Roomy(), most)
        self.jobs = Together(shared()[1], batch, limit, self.watching)
        self.told: list[list[Event]] = []

    def ask(self, prompt: list[int], count: int, *stops: str, after: Any = None) -> Job:
        """``after``: is called with the job at each event of it."""
        events: list[Event] = []

        def tell(event: Event) -> None:
            events.append(event)
            if after is not None:
                after(job, event)

        job = Job(prompt, Sampling(max_new_tokens=count, greedy=True), stops, tell)
        self.jobs.submit(job)
        self.told.append(events)
        return job

    def stop(self, job: Job, event: Event) -> None:
        if not isinstance(event, Piece):
            self.jobs.stop()

    def text(self, index: int) -> str:
        return "".join(event.text for event in self.told[index] if isinstance(event, Piece))


def test_jobs() -> None:
    """One ends at a string that lies in two tokens; one is cancelled amid its text, one as it waits."""
    words = [f"{token} " for token in expected(PROMPTS[0], LONGEST, do_sample=False)]
    desk = Desk(limit=5)

    def leave(job: Job, event: Event) -> None:
        if job.asked and len(desk.told[1]) == 3:
            desk.jobs.cancel(job)
            desk.jobs.cancel(waits)

    desk.ask(PROMPTS[0], LONGEST, "nowhere", words[5][-2:] + words[6])
    desk.ask(PROMPTS[1], LONGEST, after=leave)
    waits = desk.ask(PROMPTS[2], LONGEST)
    desk.ask([], LONGEST)
    desk.ask(PROMPTS[3], LONGEST, after=desk.stop)
    with pytest.raises(Busy, match="5 requests wait"):
        desk.ask(PROMPTS[4], 1)
    assert (desk.jobs.waiting, desk.jobs.running) == (5, 0)
    desk.jobs.run()
    assert (desk.jobs.waiting, desk.jobs.running) == (0, 0)
    assert desk.text(0) == "".join(words[:6])[:-2] and desk.told[0][-1] == Ended("stop", 7)
    assert len(desk.told[1]) == 3 and desk.told[2] == []  # and no end of it
    (refused,) = desk.told[3]
    assert isinstance(refused, Failed) and isinstance(refused.error, UsageError)
    last = expected(PROMPTS[3], LONGEST, do_sample=False)
    assert desk.text(4).split() == [str(token) for token in last]
    assert desk.told[4][-1] == Ended("length", LONGEST)
    assert desk.watching.begun == desk.watching.over == 4
    with pytest.raises(Ending):
        desk.ask(PROMPTS[0], 1)


def test_a_job_that_is_cancelled_as_its_turn_comes() -> None:
    """It is begun for nothing, and nothing is told of it."""
    desk = Desk(limit=2)
    job = desk.ask(PROMPTS[0], LONGEST)
    desk.ask(PROMPTS[1], 3, after=desk.stop)
    begin = desk.watching.begin

    def late(begun: Job) -> None:
        begin(begun)
        desk.jobs.cancel(job)

    desk.watching.begin = late  # type: ignore[method-assign]
    desk.jobs.run()
    assert desk.told[0] == [] and desk.told[1][-1] == Ended("length", 3)


def test_jobs_that_are_left_when_it_ends() -> None:
    desk = Desk(limit=4)
    desk.ask(PROMPTS[0], 3, after=desk.stop)
    desk.ask(PROMPTS[1], LONGEST)
    desk.ask(PROMPTS[2], LONGEST)
    desk.jobs.run()
    assert desk.told[0][-1] == Ended("length", 3)
    for events in desk.told[1:]:
        assert isinstance(events[-1], Failed) and isinstance(events[-1].error, Ending)
