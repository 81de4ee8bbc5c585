"""The page of meters at ``/``: its files, what it asks for, and the swap that it can order.

Runs in the server's thread. The feeder is asked as ``python -m feeder status`` asks it, in a thread of
its own, so that a model which waits for a weight holds up nobody who looks at it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from common import protocol as p
from common.ask import SWAP_PATIENCE_S, ask
from common.config import SLOTS, Cache
from common.errors import PeerError, UsageError, WeightFeederError
from common.model_map import rows
from engine.client import WeightClient
from engine.serve.errors import ApiError
from engine.serve.jobs import Scheduler
from engine.serve.metrics import Meters

FRESH_S = 0.2  # how old an answer of the feeder's may be that several readers share
PATIENCE_S = 2.0
MAX_WISH_BYTES = 4096
#: Paths that say nothing of anybody and take no key.
OPEN = ("/", "/meters.css", "/meters.js")
_FILES = {
    "/": ("index.html", "text/html"),
    "/meters.css": ("meters.css", "text/css"),
    "/meters.js": ("meters.js", "text/javascript"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class Page:
    """``feeder_name``: the run directory's. ``names``: of the weights, in the store's order."""

    def __init__(
        self,
        model: str,
        names: Sequence[str],
        feeder_name: str,
        scheduler: Scheduler,
        meters: Meters,
        client: WeightClient,
    ) -> None:
        self._model = {
            "model": model,
            "names": list(names),
            "rows": [{"label": row.label, "weights": row.weights} for row in rows(names)],
        }
        self._feeder_name, self._scheduler = feeder_name, scheduler
        self._meters, self._client = meters, client
        self._asking = asyncio.Lock()
        self._said: p.Fields | None = None
        self._said_at = float("-inf")
        directory = Path(__file__).parent
        self._files = {path: (directory / name).read_bytes() for path, (name, _) in _FILES.items()}

    def routes(self) -> list[Route]:
        return [
            *(Route(path, self._file, methods=["GET"]) for path in _FILES),
            Route("/meters/model", self._whole, methods=["GET"]),
            Route("/meters/now", self._now, methods=["GET"]),
            Route("/meters/swap", self._swap, methods=["POST"]),
        ]

    async def _file(self, request: Request) -> Response:
        path = request.scope["path"]
        return Response(self._files[path], media_type=_FILES[path][1], headers=_HEADERS)

    async def _whole(self, _: Request) -> Response:
        return JSONResponse(self._model, headers=_HEADERS)

    async def _now(self, _: Request) -> Response:
        feeder = await self._feeder()
        stats, answered, refused = self._client.stats, *self._meters.answers()
        said = {
            "at_s": time.monotonic(),
            "tokens": self._meters.tokens,
            "stall_s": stats.stall_s,
            "uses": stats.uses,
            "running": self._scheduler.running,
            "waiting": self._scheduler.waiting,
            "answered": answered,
            "refused": refused,
            "engine_peak_bytes": self._client.peak_bytes(),
            "feeder": feeder,
        }
        return JSONResponse(said, headers=_HEADERS)

    async def _feeder(self) -> p.Fields | None:
        """What the feeder says of itself, None if there is none. Many readers cost one question."""
        async with self._asking:
            if time.monotonic() - self._said_at > FRESH_S:
                try:
                    answer = await asyncio.to_thread(
                        ask, self._feeder_name, p.StatusRequest(), PATIENCE_S
                    )
                    self._said = answer.fields if isinstance(answer, p.Status) else None
                except WeightFeederError:
                    self._said = None
                self._said_at = time.monotonic()
            return self._said

    async def _swap(self, request: Request) -> Response:
        _require_json(request)
        wish = _wish(await request.body())
        said = await self._feeder()
        if said is None:
            raise ApiError(503, "no feeder answers: try again when there is one")
        known = str(said.get("strategies", "")).split(",")
        if wish.strategy not in ("", *known):  # a file's class would be anybody's program
            text = f"strategy {wish.strategy[:80]!r} found: expected one of {', '.join(known)}"
            raise ApiError(400, text, None, "strategy")
        try:
            answer = await asyncio.to_thread(ask, self._feeder_name, wish, SWAP_PATIENCE_S)
        except PeerError as error:
            raise ApiError(409, str(error), "swap_refused") from error
        self._said_at = float("-inf")
        text = answer.text if isinstance(answer, p.Done) else ""
        return JSONResponse({"text": text}, headers=_HEADERS)


def _require_json(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which no page may send elsewhere without being asked first
        raise ApiError(415, f"content type {kind[:80]!r} found: expected application/json")


def _wish(body: bytes) -> p.Swap:
    """ApiError 400 for what cannot be wished for."""
    try:
        fields: Any = json.loads(body[: MAX_WISH_BYTES + 1])
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    names = ("strategy", "cache", "slots")
    if not isinstance(fields, dict) or not fields.keys() <= set(names):
        raise ApiError(400, f"expected a JSON object with {', '.join(names)}")
    values = [fields.get(name, "") for name in names]
    if not all(isinstance(value, str) for value in values):
        raise ApiError(400, f"expected texts for {', '.join(names)}")
    strategy, cache, slots = values
    if slots not in ("", *SLOTS):
        raise ApiError(
            400, f"slots {slots[:80]!r} found: expected {', '.join(SLOTS)}", None, "slots"
        )
    try:
        if cache:
            Cache.parse(cache)
    except UsageError as error:
        raise ApiError(400, str(error), None, "cache") from error
    return p.Swap(strategy, cache, slots)
