"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

import json
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from dsv3.errors import RunError, UserError

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
"""By status; any other is an `invalid_request_error` below 500, else a `server_error`."""


class ApiError(UserError):
    """A refusal with its own status and code; any other `UserError` is a 400 without a code."""

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class Overloaded(RunError):
    """Too many requests are open: worth another attempt."""

    status, code = 429, "overloaded"


class Unavailable(RunError):
    """The engine has ended."""

    status, code = 503, "unavailable"


class Lost(RunError):
    """The engine did not finish a request that it had accepted: 500."""


def body_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """(status, content) for any exception of a request."""
    status = getattr(error, "status", 400 if isinstance(error, UserError) else 500)
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    about = {name: getattr(error, name, None) for name in ("param", "code")}
    return status, {"error": {"message": str(error), "type": kind, **about}}


def encode(content: object) -> bytes:
    """JSON in ASCII, which can also encode a lone surrogate that a client may have sent; UTF-8 cannot."""
    return json.dumps(content, separators=(",", ":")).encode()


def response_of(error: Exception) -> Response:
    """The answer to a request that raised."""
    status, content = body_of(error)
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    if status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    return Response(encode(content), status, headers, "application/json")


def add_handlers(app: FastAPI) -> None:
    """Gives every route's errors the same form."""

    async def ours(request: Request, error: Exception) -> Response:
        return response_of(error)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return response_of(ApiError(f"{where}: {first['msg']}" if where else first["msg"], param=where or None))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = error.detail or HTTPStatus(error.status_code).phrase
        return response_of(ApiError(f"{request.method} {request.url.path}: {message}", error.status_code))

    app.add_exception_handler(UserError, ours)
    app.add_exception_handler(RunError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
