"""The paths of the server: a request in, a job submitted, its events turned into a reply.

Runs in the server's thread. Knows the scheduler's protocol, and nothing of the model but its codec.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from common.errors import UsageError, WeightFeederError
from engine.client import WeightClient
from engine.generate import Sampling, check_length
from engine.serve.errors import ApiError, api_error, on_api_error, on_defect, on_http_error
from engine.serve.gate import Gate
from engine.serve.jobs import Ended, Event, Failed, Job, Piece, Scheduler
from engine.serve.metrics import Meters
from engine.serve.page import Page
from engine.serve.replies import Choice, Shape, server_sent
from engine.serve.schema import ChatRequest, CompletionRequest, parse
from engine.text import Codec

COMPLETION_TOKENS = 16  # of a bare completion, if it does not say: what the API has it be
LEAST_TEMPERATURE = 0.01
QUIET_S = 10.0  # a stream in which nothing happens says so: half-open connections are found, too
STATUS_INTERVAL_S = 1.0

Events = asyncio.Queue[tuple[int, Event]]  # of the answers to a request, by their numbers


@dataclass(frozen=True)
class Model:
    """What is served. ``codec`` is the server's own: tokenizers are no good for two threads."""

    name: str
    codec: Codec
    context: int
    vocabulary: int
    max_tokens: int


class App:
    """The paths, and what they need."""

    def __init__(
        self,
        model: Model,
        scheduler: Scheduler,
        meters: Meters,
        client: WeightClient,
        page: Page,
    ) -> None:
        self._model, self._scheduler, self._meters = model, scheduler, meters
        self._client, self._page = client, page
        self._created = int(time.time())
        self._watchers: set[asyncio.Task[None]] = (
            set()
        )  # the loop itself keeps only weak references

    def asgi(self, key: str | None) -> Starlette:
        """The application for a server."""
        routes = [
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._one_model, methods=["GET"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
            *self._page.routes(),
        ]
        paths = {route.path for route in routes}

        def note(
            path: str, status: int
        ) -> None:  # of paths that anybody may think of there is no end
            self._meters.replies.labels(path if path in paths else "other", status).inc()

        handlers: dict[Any, Any] = {
            ApiError: on_api_error, HTTPException: on_http_error, Exception: on_defect,
        }  # fmt: skip
        return Starlette(
            routes=routes,
            middleware=[Middleware(Gate, key=key, note=note)],
            exception_handlers=handlers,
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async def ask() -> None:
            while True:
                self._client.glance()
                await asyncio.sleep(STATUS_INTERVAL_S)

        task = asyncio.create_task(ask())
        yield
        task.cancel()

    # What is there -----------------------------------------------------------------------------

    async def _health(self, _: Request) -> Response:
        if self._client.has_feeder:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "waiting for a feeder"}, 503)

    async def _metrics(self, _: Request) -> Response:
        return Response(self._meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "weight-feeder",
            "context_length": self._model.context,
        }

    def _check_model(self, name: str) -> None:
        if name != self._model.name:
            text = f"model {name[:200]!r} is not served here: expected {self._model.name!r}"
            raise ApiError(404, text, "model_not_found", "model")

    # Answers -----------------------------------------------------------------------------------

    async def _chat(self, http: Request) -> Response:
        request = parse(ChatRequest, await http.body())
        self._check_model(request.model)
        try:
            prompt = self._model.codec.encode_chat(request.conversation())
        except UsageError as error:
            raise ApiError(400, str(error), None, "messages") from error
        tokens = request.max_completion_tokens or request.max_tokens
        return await self._answer(http, request, prompt, tokens)

    async def _completion(self, http: Request) -> Response:
        request = parse(CompletionRequest, await http.body())
        self._check_model(request.model)
        if isinstance(request.prompt, str):
            try:
                prompt = self._model.codec.encode(request.prompt, raw=True)
            except UsageError as error:
                raise ApiError(400, str(error), None, "prompt") from error
        else:
            prompt = request.prompt
            if not all(0 <= token < self._model.vocabulary for token in prompt):
                text = f"prompt: expected token ids below {self._model.vocabulary}"
                raise ApiError(400, text, None, "prompt")
        return await self._answer(http, request, prompt, request.max_tokens or COMPLETION_TOKENS)

    async def _answer(
        self,
        http: Request,
        request: ChatRequest | CompletionRequest,
        prompt: list[int],
        max_tokens: int | None,
    ) -> Response:
        if not prompt:
            raise ApiError(400, "the prompt is empty: give at least one token", None, "prompt")
        try:
            check_length(len(prompt), self._model.context)
        except UsageError as error:
            raise ApiError(400, str(error), "context_length_exceeded") from error
        samplings, likeliest = self._samplings(request, max_tokens), request.likeliest
        events: Events = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(index: int, event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        jobs = [
            Job(prompt, sampling, request.stops, partial(tell, index), likeliest)
            for index, sampling in enumerate(samplings)
        ]
        is_chat = isinstance(request, ChatRequest)
        spell = None if likeliest is None else self._model.codec.token_bytes
        shape = Shape(is_chat, self._model.name, len(prompt), spell)
        try:
            self._scheduler.submit(*jobs)
        except WeightFeederError as error:
            raise api_error(error) from error
        watcher = asyncio.create_task(self._cancel_when_gone(http, jobs))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        if request.stream:
            chunks = _stream(shape, events, len(jobs), request.wants_usage)
            return StreamingResponse(chunks, media_type="text/event-stream")
        return JSONResponse(await _whole(shape, events, len(jobs)))

    def _samplings(
        self, request: ChatRequest | CompletionRequest, max_tokens: int | None
    ) -> list[Sampling]:
        """That of each answer: with a seed, the next one's is greater by one."""
        limit = self._model.max_tokens
        if max_tokens is not None and max_tokens > limit:
            text = f"max_tokens {max_tokens} is more than this server's limit of {limit}"
            raise ApiError(400, text, None, "max_tokens")
        if request.temperature is not None and 0 < request.temperature < LEAST_TEMPERATURE:
            text = (
                f"temperature {request.temperature}: expected 0, or from {LEAST_TEMPERATURE} to 2"
            )
            raise ApiError(400, text, None, "temperature")
        sampling = Sampling(
            max_new_tokens=max_tokens or limit,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            repetition_penalty=request.repetition_penalty,
        )
        if request.seed is None:
            return [sampling] * (request.n or 1)
        seeds = (request.seed + index for index in range(request.n or 1))
        return [replace(sampling, seed=seed % (1 << 32)) for seed in seeds]

    async def _cancel_when_gone(self, http: Request, jobs: Sequence[Job]) -> None:
        """A client that went away stops its answers. Ends, too, when the reply is complete, also by what
        went wrong with one of them."""
        while (await http.receive())["type"] != "http.disconnect":
            pass
        for job in jobs:
            self._scheduler.cancel(job)


async def _whole(shape: Shape, events: Events, count: int) -> dict[str, Any]:
    choices = [Choice() for _ in range(count)]
    while any(choice.ended is None for choice in choices):
        index, event = await events.get()
        choice = choices[index]
        match event:
            case Piece(piece, placed):
                choice.text += piece
                choice.placed += placed
            case Ended():
                choice.ended = event
            case Failed(error):
                raise api_error(error)
    return shape.whole(choices)


async def _stream(shape: Shape, events: Events, count: int, usage: bool) -> AsyncIterator[bytes]:
    for index in range(count):
        for chunk in shape.opening(index):
            yield server_sent(chunk)
    all_ended: list[Ended] = []
    while len(all_ended) < count:
        try:
            index, event = await asyncio.wait_for(events.get(), QUIET_S)
        except TimeoutError:
            yield b": still there\n\n"
            continue
        match event:
            case Piece(text, placed):
                yield server_sent(shape.piece(index, text, placed))
            case Ended() as ended:
                yield server_sent(shape.closing(index, ended.reason))
                all_ended.append(ended)
            case Failed(error):
                yield server_sent(api_error(error).body())
                return
    if usage:
        yield server_sent(shape.usage(all_ended))
    yield server_sent("[DONE]")
