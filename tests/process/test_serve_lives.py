"""A server whose clients leave, whose feeder dies, and which is ended itself."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import lives, processes
from tests.processes import Room
from tests.serving import Serving

#: The generation of lives.engine_flags, as a client asks for it.
ASKED: Any = {"model": "long", "prompt": "5 17 300 2", "temperature": 1, "seed": 3}


def serve(room: Room, *flags: str) -> Serving:
    flags = ("serve", "--port=0", "--model-name=long", *flags)
    return Serving.wait(room.start("-m", "engine", *flags))


@pytest.fixture(scope="module")
def serving(long_store: Path) -> Iterator[Serving]:
    """With room for one request that waits."""
    with processes.room() as place:
        place.feeder(*lives.feeder_flags(long_store))
        yield serve(place, "--queue=1", "--batch=1")


def begun(serving: Serving, tokens: int) -> Any:
    """A stream of so many tokens, of which the first is there."""
    stream = serving.client().completions.create(**ASKED, max_tokens=tokens, stream=True)
    next(stream)
    return stream


def test_a_seed_is_the_command_lines(serving: Serving, long_text: list[str]) -> None:
    client = serving.client()
    asked = ASKED | {"max_tokens": 60}
    text = client.completions.create(**asked).choices[0].text
    assert text.split() == long_text[:60]
    asked.pop("seed")
    others = {client.completions.create(**asked).choices[0].text for _ in range(2)}
    assert len(others | {text}) == 3  # each with random numbers of its own
    tokens = [int(token) for token in ASKED["prompt"].split()]
    again = client.completions.create(**ASKED | {"max_tokens": 60, "prompt": tokens})
    assert again.choices[0].text == text


def test_a_conversation_goes_on(serving: Serving) -> None:
    """What the last request has left is not computed again, and changes nothing."""
    client = serving.client()

    def ask(prompt: list[int], seed: int | None = None) -> tuple[list[int], int, Any]:
        greedy = {"temperature": 0, "max_tokens": 12, "logprobs": 2}
        fields: Any = ASKED | greedy | {"prompt": prompt, "seed": seed}
        answer = client.completions.create(**fields)
        details: Any = answer.usage and answer.usage.prompt_tokens_details
        (choice,) = answer.choices
        return [int(token) for token in choice.text.split()], details.cached_tokens, choice.logprobs

    prompt = [5, 17, 300, 2, 7]
    first, kept, _ = ask(prompt)
    assert kept <= 4  # the template of other tests' requests
    longer = [*prompt, *first, 44, 3]
    second, kept, logprobs = ask(longer)
    assert kept == len(prompt) + len(first) - 1  # the last token was not computed
    assert ask([9, 9])[1] == 0
    again, kept, likewise = ask(longer)
    assert (again, kept) == (second, 0)
    assert likewise.tokens == logprobs.tokens
    assert likewise.token_logprobs == pytest.approx(logprobs.token_logprobs, abs=1e-3)
    assert ask([*longer, *second, 8], seed=3)[1] == 0  # a seed is to give the same text at any time


def test_what_this_store_cannot_do(serving: Serving) -> None:
    client = serving.client()
    messages: Any = [{"role": "user", "content": "1"}]
    with pytest.raises(openai.BadRequestError, match="no tokenizer, and so no chat"):
        client.chat.completions.create(model="long", messages=messages)
    with pytest.raises(openai.BadRequestError, match="expected a prompt of token ids"):
        client.completions.create(**ASKED | {"prompt": "words"})
    with pytest.raises(openai.BadRequestError, match="expected token ids below"):
        client.completions.create(**ASKED | {"prompt": [-1]})


def test_a_page_from_elsewhere_is_refused(serving: Serving) -> None:
    """Without a key, only names that mean this machine are answered."""
    assert serving.raw("GET", "/v1/models", host="elsewhere.example").status == 403
    assert serving.raw("GET", "/v1/models", host=f"localhost:{serving.port}").status == 200


def test_clients_that_go_away(serving: Serving, long_text: list[str]) -> None:
    """One in the middle of its answer, one while it waits; a third is refused for want of room."""
    before, gone = (
        serving.metric(name) for name in ("generated_tokens_total", "abandoned_requests_total")
    )
    client = serving.client()
    running = begun(serving, 2 * lives.LONGEST - 10)
    waiting = client.completions.create(**ASKED, stream=True)
    serving.until_metric("queue_length", 1)
    with pytest.raises(openai.RateLimitError, match="1 requests wait already"):
        client.completions.create(**ASKED, max_tokens=1)
    waiting.close()
    serving.until_metric("queue_length", 0)
    assert serving.metric("running_requests") == 1
    running.close()
    serving.until_metric("running_requests", 0)
    assert serving.metric("abandoned_requests_total") == gone + 1  # the other was never begun
    assert serving.metric("generated_tokens_total") < before + 2 * lives.LONGEST - 10
    text = client.completions.create(**ASKED, max_tokens=20).choices[0].text
    assert text.split() == long_text[:20]


def test_several_answers_wait_and_go_together(serving: Serving, long_text: list[str]) -> None:
    """They are one request to the queue, and leave with their client."""
    client = serving.client()
    texts = client.completions.create(**ASKED, max_tokens=20, n=3).choices
    assert texts[0].text.split() == long_text[:20]
    assert len({choice.text for choice in texts}) == 3
    gone = serving.metric("abandoned_requests_total")
    stream = client.completions.create(**ASKED, max_tokens=2 * lives.LONGEST - 10, n=3, stream=True)
    next(stream)
    serving.until_metric("queue_length", 2)
    with pytest.raises(openai.RateLimitError, match="2 requests wait already"):
        client.completions.create(**ASKED, max_tokens=1)
    stream.close()
    serving.until_metric("running_requests", 0)
    serving.until_metric("queue_length", 0)
    assert serving.metric("abandoned_requests_total") == gone + 1  # the others were never begun


def test_a_feeder_killed_amid_an_answer(room: Room, long_store: Path, long_text: list[str]) -> None:
    feeder = room.feeder(*lives.feeder_flags(long_store))
    serving = serve(room)
    stream = begun(serving, 200)
    feeder.signal(signal.SIGKILL)
    feeder.popen.wait()
    serving.until_metric("feeder_up", 0)  # answered although the model waits
    assert serving.raw("GET", "/health").status == 503
    successor = room.feeder(*lives.feeder_flags(long_store, 2, "resident"))
    rest = "".join(chunk.choices[0].text for chunk in stream)
    assert rest.split() == long_text[1:200]
    assert f"feeder {successor.pid} takes over" in serving.process.err


def test_ended_amid_an_answer(room: Room, long_store: Path) -> None:
    launcher = room.launch(
        "serve", "--port=0", "--model-name=long", f"--model={long_store}", "--cache=3"
    )
    serving = Serving.wait(launcher)
    stream = begun(serving, lives.LONGEST)
    launcher.signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="the server has ended"):
        list(stream)
    ended = launcher.wait()
    assert ended.code == 143 and "Traceback" not in ended.err, ended.err
