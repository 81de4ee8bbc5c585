"""The official client against a server that the launcher started, with the demo model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoTokenizer

from demo.sums import Sum
from tests import processes
from tests.processes import DEMO, Room, assert_refused
from tests.reference import reference_model
from tests.serving import KEY, Serving

SUM = Sum("1.1", "2.3")
FREE = "Why is the sky blue?"  # to which the demo has no answer: samples differ


@pytest.fixture(scope="module")
def serving(demo_store: Path) -> Iterator[Serving]:
    with processes.room() as place:
        process = place.launch(
            "serve", "--port=0", f"--api-key={KEY}", f"--model={demo_store}", "--max-tokens=120"
        )
        yield Serving.wait(process)
        assert process.stop().code == 143


def chat(serving: Serving, text: str, **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return serving.client().chat.completions.create(model="store", messages=messages, **fields)


def test_models(serving: Serving) -> None:
    client = serving.client()
    assert [model.id for model in client.models.list()] == ["store"]
    assert client.models.retrieve("store").id == "store"


def test_a_chat(serving: Serving) -> None:
    answer = chat(serving, SUM.prompt)
    (choice,) = answer.choices
    assert choice.message.content == SUM.working and choice.finish_reason == "stop"
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens > 90  # every digit is one


def test_a_stream_says_the_same(serving: Serving) -> None:
    text, reasons = "", []
    stream = chat(serving, SUM.prompt, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        text += chunk.choices[0].delta.content or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert text == SUM.working
    assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}
    assert len(chunks) > 50  # as it was made
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 90


def test_completions_and_their_streams(serving: Serving) -> None:
    client = serving.client()
    asked: Any = {"model": "store", "prompt": SUM.prompt}
    whole = client.completions.create(**asked, max_tokens=30)
    (choice,) = whole.choices
    assert ("\n" + SUM.working).startswith(choice.text) and choice.finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == 30
    stream = client.completions.create(**asked, max_tokens=30, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == choice.text
    short = client.completions.create(**asked)  # the API's own default
    assert short.usage is not None and short.usage.completion_tokens == 16


def test_a_stop_string_across_tokens(serving: Serving) -> None:
    stop = ".10+0"  # five tokens of the working's first line
    assert SUM.working.startswith("001.10+002.30\n")
    answer = chat(serving, SUM.prompt, stop=["nowhere", stop])
    assert answer.choices[0].message.content == "001"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 12  # the rest was not generated
    chunks = chat(serving, SUM.prompt, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "001"
    # What only begins like a stop string is told in the end.
    answer = chat(serving, SUM.prompt, stop="002.30+", max_tokens=13)
    assert answer.choices[0].message.content == "001.10+002.30"


def test_four_at_once_are_not_mixed(serving: Serving) -> None:
    sums = [Sum("12.5", "7.25"), Sum("300", "41"), Sum("0.07", "9.9"), Sum("77.7", "88.8")]
    ready = threading.Barrier(len(sums))

    def ask(task: Sum) -> str:
        ready.wait()
        chunks = chat(serving, task.prompt, stop="write", stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(len(sums)) as pool:
        texts = list(pool.map(ask, sums))
    assert texts == [task.working.partition("write")[0] for task in sums]


def test_several_answers_to_a_chat(serving: Serving) -> None:
    """Each is that of its own seed alone, and a stream says the same."""
    asked: Any = {"temperature": 2, "max_tokens": 30}
    alone = [chat(serving, FREE, **asked, seed=seed) for seed in (5, 6, 7)]
    texts = [answer.choices[0].message.content for answer in alone]
    assert len(set(texts)) > 1
    answer = chat(serving, FREE, **asked, seed=5, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == texts
    reasons = [one.choices[0].finish_reason for one in alone]
    assert [choice.finish_reason for choice in answer.choices] == reasons
    usage = answer.usage
    assert usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    usual: Any = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = chat(serving, FREE, **asked, **usual, seed=5, n=3)
    assert last.choices == [] and last.usage == usage
    streamed: list[list[Any]] = [[], [], []]
    for chunk in chunks:
        (choice,) = chunk.choices
        streamed[choice.index].append(choice)
    for parts, text, reason in zip(streamed, texts, reasons, strict=True):
        assert parts[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in parts) == text
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [reason]
    others = chat(serving, FREE, **asked, n=4).choices  # without a seed, too, each its own
    assert len({choice.message.content for choice in others}) > 1


def test_several_completions(serving: Serving) -> None:
    client = serving.client()
    asked: Any = {"model": "store", "prompt": FREE, "max_tokens": 12, "temperature": 2}
    asked |= {"seed": (1 << 32) - 1, "logprobs": 1}  # after the last seed comes the first
    alone = [client.completions.create(**asked | {"seed": seed}) for seed in ((1 << 32) - 1, 0)]
    found = client.completions.create(**asked, n=2)
    assert [choice.index for choice in found.choices] == [0, 1]
    for choice, one in zip(found.choices, alone, strict=True):
        assert choice.text == one.choices[0].text and choice.logprobs == one.choices[0].logprobs
    texts = ["", ""]
    for chunk in client.completions.create(**asked, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in found.choices]


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "too many answers": ({"n": 17}, 400, "n: Input should be less than or equal to 16"),
    "no answers": ({"n": 0}, 400, "n: Input should be greater than or equal to 1"),
    "too many logprobs": ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs: Input should"),
    "logprobs by half": ({"top_logprobs": 2}, 400, "top_logprobs 2 without logprobs: give"),
    "logprobs in the other form": ({"logprobs": 2}, 400, "logprobs: "),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    "a hot temperature": ({"temperature": 2.5}, 400, "temperature: "),
    "a temperature next to nothing": ({"temperature": 1e-30}, 400, "expected 0, or from 0.01"),
    "too many tokens": ({"max_tokens": 121}, 400, "more than this server's limit of 120"),
    "no tokens": ({"max_completion_tokens": 0}, 400, "max_completion_tokens: "),
    "an unknown field": ({"extra_body": {"x_y": 1}}, 400, "x_y is not known here"),
    "another model": ({"model": "gpt"}, 404, "'gpt' is not served here: expected 'store'"),
    "no messages": ({"messages": []}, 400, "messages: "),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0",
    ),
    "a text that is none": (
        {"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content: Input should be",
    ),
    "a prompt longer than the context": (
        {"messages": [{"role": "user", "content": "1" * 600}]}, 400, "tokens, the model's context",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(serving: Serving, name: str) -> None:
    fields, status, message = REFUSED[name]
    asked: Any = {"model": "store", "messages": [{"role": "user", "content": "1+1=?"}]} | fields
    with pytest.raises(openai.APIStatusError) as refused:
        serving.client().chat.completions.create(**asked)
    assert refused.value.status_code == status
    error: Any = refused.value.body
    assert message in error["message"] and error["type"] == "invalid_request_error"


@cache
def demo() -> tuple[Any, Any]:
    """Tokenizer and plain model."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
    return tokenizer, reference_model(DEMO, torch.float32)


def likelihoods(prompt: str, text: str) -> tuple[list[str], torch.Tensor]:
    """The tokens of ``text``, and the plain model's log probabilities of all tokens at their places."""
    tokenizer, model = demo()
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = tokenizer(text, add_special_tokens=False).input_ids
    with torch.inference_mode():
        logits = model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1]
    return tokenizer.batch_decode([[token] for token in ids]), torch.log_softmax(logits, -1)


@pytest.mark.usefixtures("one_thread")
def test_logprobs_of_a_chat(serving: Serving) -> None:
    """Of the model's own distribution, whatever the sampling; a stream says the same."""
    asked: Any = {
        "logprobs": True,
        "top_logprobs": 20,
        "stop": " write",
        "seed": 5,
        "max_tokens": 40,
    }
    asked["temperature"] = 0.7
    (choice,) = chat(serving, SUM.prompt, **asked).choices
    text, content = choice.message.content, choice.logprobs.content
    assert text and text.endswith("=0") and choice.logprobs.refusal is None
    prompt = f"<|im_start|>user\n{SUM.prompt}<|im_end|>\n<|im_start|>assistant\n"
    tokens, expected = likelihoods(prompt, text)
    assert [one.token for one in content] == tokens  # and not the stop string's
    assert all(bytes(one.bytes).decode() == one.token for one in content)
    for one, row in zip(content, expected, strict=True):
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(
            row.topk(20).values.tolist(), abs=1e-3
        )
        assert one.logprob in [top.logprob for top in one.top_logprobs]
    streamed: list[Any] = []
    for chunk in chat(serving, SUM.prompt, stream=True, **asked):
        logprobs = chunk.choices[0].logprobs
        assert bool(logprobs) == bool(chunk.choices[0].delta.content)
        streamed += logprobs.content if logprobs else []
    assert [one.token for one in streamed] == tokens
    assert [one.logprob for one in streamed] == pytest.approx([one.logprob for one in content])
    (empty,) = chat(serving, SUM.prompt, logprobs=True, stop="0", temperature=0).choices
    assert empty.message.content == "" and empty.logprobs.content == []
    without = chat(serving, SUM.prompt, **asked | {"top_logprobs": None})
    assert [one.top_logprobs for one in without.choices[0].logprobs.content] == [[]] * len(tokens)


@pytest.mark.usefixtures("one_thread")
def test_logprobs_of_a_completion(serving: Serving) -> None:
    client = serving.client()
    asked: Any = {"model": "store", "prompt": SUM.prompt, "logprobs": 5, "max_tokens": 25}
    (choice,) = client.completions.create(**asked).choices
    found: Any = choice.logprobs
    tokens, expected = likelihoods(SUM.prompt, choice.text)
    assert found.tokens == tokens and "".join(found.tokens) == choice.text
    assert found.text_offset == [sum(map(len, tokens[:at])) for at in range(len(tokens))]
    for token, value, top, row in zip(
        tokens, found.token_logprobs, found.top_logprobs, expected, strict=True
    ):
        assert top[token] == value == pytest.approx(row.max().item(), abs=1e-3)  # it is greedy
        assert sorted(top.values(), reverse=True) == pytest.approx(
            row.topk(5).values.tolist(), abs=1e-3
        )
    offsets: list[int] = []
    for chunk in client.completions.create(**asked, stream=True):
        logprobs = chunk.choices[0].logprobs
        offsets += logprobs.text_offset if logprobs else []
    assert offsets == found.text_offset
    none = client.completions.create(**asked | {"logprobs": 0, "max_tokens": 3}).choices[0].logprobs
    assert [list(top) for top in none.top_logprobs] == [[token] for token in tokens[:3]]  # type: ignore
    assert client.completions.create(**asked | {"logprobs": False}).choices[0].logprobs is None
    with pytest.raises(
        openai.BadRequestError, match="logprobs: Input should be less than or equal"
    ):
        client.completions.create(**asked | {"logprobs": 6})


def test_what_asks_for_nothing_is_taken(serving: Serving) -> None:
    answer = chat(
        serving, SUM.prompt, n=1, logprobs=False, frequency_penalty=0, user="somebody",
        tools=[], response_format={"type": "text"}, max_tokens=3, temperature=0, top_p=1,
    )  # fmt: skip
    assert answer.choices[0].message.content == SUM.working[:3]


def test_the_key(serving: Serving) -> None:
    for client in (serving.client("another"), serving.client(KEY + "x")):
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
            client.models.list()
    assert serving.raw("GET", "/metrics").status == 401
    assert serving.raw("GET", "/health").status == 200


def test_paths_and_bodies_that_are_none(serving: Serving) -> None:
    authorization = f"Bearer {KEY}"
    assert serving.raw("GET", "/v1/nothing", authorization=authorization).status == 404
    wrong_method = serving.raw("GET", "/v1/completions", authorization=authorization)
    assert wrong_method.status == 405 and b'"error"' in wrong_method.read()
    large = serving.raw(
        "POST", "/v1/completions", authorization=authorization, content_length=str(9 << 20)
    )
    assert large.status == 413 and b'"error"' in large.read()
    empty = serving.raw("POST", "/v1/completions", authorization=authorization)
    assert empty.status == 400 and b"not JSON" in empty.read()


def test_metrics(serving: Serving) -> None:
    before = serving.metric("generated_tokens_total")
    chat(serving, SUM.prompt, max_tokens=7)
    serving.until_metric("generated_tokens_total", before + 7)
    serving.until_metric("queue_length", 0)
    serving.until_metric("feeder_up", 1)
    serving.until_metric('slots{state="in_use"}', 57)  # all of the demo's weights stay
    assert serving.metric("arena_bytes") > 0 and serving.metric("weight_uses_total") > 0
    assert serving.metric("time_to_first_token_seconds_count") > 0


def test_other_machines_need_a_key(room: Room) -> None:
    engine = room.start("-m", "engine", "serve", "--host=0.0.0.0", "--port=0")
    assert_refused(engine.wait(), "give --api-key KEY too", code=2)


def test_a_port_that_is_taken(serving: Serving, room: Room) -> None:
    engine = room.start("-m", "engine", "serve", f"--port={serving.port}")
    assert_refused(engine.wait(), f"cannot listen on 127.0.0.1 port {serving.port}: ", code=2)
