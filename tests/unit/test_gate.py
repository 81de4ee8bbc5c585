"""The gate in front of the server's router, asked as an ASGI server asks it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from engine.serve.gate import MAX_BODY_BYTES, Gate

KEY = "a key"


async def _inside(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def ask(
    key: str | None, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, Any]]:
    """Status and body of the reply."""
    said: list[Message] = []
    raw = [(name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()]
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "root_path": "",
        "scheme": "http", "query_string": b"", "headers": raw, "server": ("127.0.0.1", 8000),
    }  # fmt: skip

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        said.append(message)

    asyncio.run(Gate(_inside, key, lambda path, status: None)(scope, receive, send))
    return said[0]["status"], json.loads(said[1]["body"])


@pytest.mark.parametrize("host", ["a/health?", "a/?", "x/meters.js?", "127.0.0.1", "a@b/health#"])
def test_no_host_opens_what_the_key_locks(host: str) -> None:
    """Of some versions of starlette the URL's path begins in the Host header."""
    assert ask(KEY, "/v1/models", host=host)[0] == 401
    assert ask(KEY, "/meters/swap", "POST", host=host)[0] == 401
    assert ask(KEY, "/health", host=host)[0] == 200
    assert ask(KEY, "/v1/models", host=host, authorization=f"Bearer {KEY}")[0] == 200
    assert ask(KEY, "/v1/models", host=host, authorization=f"Bearer {KEY}x")[0] == 401


@pytest.mark.parametrize(("key", "more"), [(None, {}), (KEY, {"authorization": f"Bearer {KEY}"})])
def test_other_sites_pages_start_nothing(key: str | None, more: dict[str, str]) -> None:
    here = {"host": "localhost:8000"} | more
    for elsewhere in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"sec_fetch_site": "cross-site"},
        {"origin": "http://localhost:8000", "sec_fetch_site": "same-site"},
    ):
        status, body = ask(key, "/v1/completions", "POST", **here, **elsewhere)
        assert (status, body["error"]["code"]) == (403, "origin_refused")
        assert ask(key, "/v1/models", **here, **elsewhere)[0] == 200  # it cannot read the reply
    assert ask(key, "/v1/completions", "POST", **here)[0] == 200
    same = {"origin": "http://localhost:8000", "sec_fetch_site": "same-origin"}
    assert ask(key, "/v1/completions", "POST", **here, **same)[0] == 200


def test_without_a_key_the_name_must_be_this_machines() -> None:
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000"):
        assert ask(None, "/v1/models", host=host)[0] == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "[::1", ""):
        assert ask(None, "/v1/models", host=host)[0] == 403


def test_a_body_that_says_it_is_too_large() -> None:
    size = str(MAX_BODY_BYTES + 1)
    assert ask(None, "/v1/completions", "POST", host="localhost", content_length=size)[0] == 413
