"""Errors as OpenAI's clients read them: ``{"error": {message, type, param, code}}``.

No message says where on the server a file lies: what nobody foresaw is told to the log alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
UNFORESEEN = "the server failed; its log has the reason"


def _shortened(message: str, most: int = 1000) -> str:
    """Without the middle of a message that quotes much of what a client sent."""
    half = most // 2
    return message if len(message) <= most else f"{message[:half]} … {message[-half:]}"


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is none."""

    error: ErrorInfo


class ApiError(Exception):
    """An answer with an error. param: the field that is wrong. code: for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message = message.encode(errors="replace").decode()  # half a character is no JSON
        message = _shortened(message)
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        other = "invalid_request_error" if status < 500 else "server_error"
        self.info = {
            "message": message,
            "type": _TYPES.get(status, other),
            "param": param,
            "code": code,
        }

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.info}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


async def answer_api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def answer_http_error(_: Request, error: Exception) -> JSONResponse:
    """What the router finds: no such path, no such method, a body that is no JSON."""
    assert isinstance(error, HTTPException)
    said = {404: "there is no such path", 405: "this path does not take this method"}
    message = said.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers).response()


async def answer_invalid(_: Request, error: Exception) -> JSONResponse:
    """A body whose fields are not what they must be."""
    assert isinstance(error, RequestValidationError)
    first = max(error.errors(), key=_fit)
    place = [key for key in first["loc"] if key != "body"]
    param = next((key for key in place if isinstance(key, str)), None)
    said = "the body is not valid JSON" if first["type"] == "json_invalid" else first["msg"]
    said = said.removeprefix("Value error, ")
    numbers = "".join(f"[{key}]" for key in place if isinstance(key, int))
    return ApiError(400, f"{param}{numbers}: {said}" if param else said, param=param).response()


def _fit(error: Mapping[str, Any]) -> tuple[bool, int, int]:
    """Of a field that may have several forms, each that it has not is an error: how near it is to
    the form that was meant."""
    numbers = [key for key in error["loc"] if isinstance(key, int)]
    return not error["type"].endswith("_type"), len(numbers), sum(numbers)


async def answer_unforeseen(_: Request, error: Exception) -> JSONResponse:
    return ApiError(500, UNFORESEEN).response()
