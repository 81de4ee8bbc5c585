"""Who may come in, and with how much: the key, the host that a browser thinks it talks to, the body's size.

Plain ASGI, in front of the router, so that nothing is read for those who may not ask.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.serve.address import is_loopback
from engine.serve.errors import ApiError
from engine.serve.page import OPEN

MAX_BODY_BYTES = 8 << 20
#: For those who watch over processes, and for browsers that have no key yet. Say nothing of anybody's text.
_OPEN = ("/health", *OPEN)


class Gate:
    """``key``: what clients must send. Without one only those are served who call this machine by a
    name of its own: a page that made its name lead here, to ask from within a browser, is not."""

    def __init__(self, app: ASGIApp, key: str | None, note: Callable[[str, int], None]) -> None:
        """``note`` is told path and status of every reply."""
        self._app, self._key, self._note = app, key, note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._note(scope["path"], message["status"])
            await send(message)

        error = self._refused(Request(scope))
        if error is None:
            await self._app(scope, _bounded(receive), noted)
        else:
            await error.reply()(scope, receive, noted)

    def _refused(self, request: Request) -> ApiError | None:
        if self._key is None:
            try:
                host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
            except ValueError:
                host = ""
            if not is_loopback(host):
                text = f"host {host[:80]!r} is not this machine: start the server with --api-key"
                return ApiError(403, text, "host_refused")
        elif request.scope["path"] not in _OPEN:  # of the URL the Host header would be a part
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode(), self._key.encode())
            if scheme.lower() != "bearer" or not same:
                text = "the API key is missing or wrong: send Authorization: Bearer KEY"
                return ApiError(401, text, "invalid_api_key")
        if request.method not in ("GET", "HEAD", "OPTIONS") and _from_elsewhere(request):
            text = "another site's page may not ask: use a program, or the page at /"
            return ApiError(403, text, "origin_refused")
        length = request.headers.get("content-length", "0")
        return _too_large() if length.isdigit() and int(length) > MAX_BODY_BYTES else None


def _from_elsewhere(request: Request) -> bool:
    """Whether a browser sends it, and says that another site's page is behind it."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    hosts = {f"{scheme}://{request.headers.get('host', '')}" for scheme in ("http", "https")}
    return (origin is not None and origin not in hosts) or site not in (None, "same-origin", "none")


def _bounded(receive: Receive) -> Receive:
    """``receive``, which refuses a body that turns out to be too large."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > MAX_BODY_BYTES:
                raise _too_large()
        return message

    return counted


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes", "body_too_large")
