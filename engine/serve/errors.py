"""Errors in the API's own form: a status, and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from common.errors import MemoryShortageError, UsageError, WeightFeederError
from common.log import log
from engine.serve.jobs import Busy, Ending


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """The reply's JSON."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def reply(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def api_error(error: WeightFeederError) -> ApiError:
    """What a client is told of an error of ours."""
    match error:
        case UsageError():
            return ApiError(400, str(error))
        case Busy():
            return ApiError(429, str(error), "queue_full")
        case MemoryShortageError():
            return ApiError(503, str(error), "out_of_memory")
        case Ending():
            return ApiError(503, str(error), "ending")
        case _:
            return ApiError(500, str(error))


async def on_api_error(_: Request, error: Exception) -> JSONResponse:
    """Handler for ApiError."""
    assert isinstance(error, ApiError)
    return error.reply()


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Handler for what the router refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    place = f"{request.method} {request.scope['path']}"
    text = {404: f"there is no {place}", 405: f"{place}: this path takes another method"}
    found = ApiError(error.status_code, text.get(error.status_code, str(error.detail)))
    reply = found.reply()
    reply.headers.update(error.headers or {})
    return reply


async def on_defect(request: Request, error: Exception) -> JSONResponse:
    """Handler for everything else."""
    log.error("%s %s: %r", request.method, request.scope["path"], error)
    return ApiError(500, "a defect of this server: its log says more").reply()
