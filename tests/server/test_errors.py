"""Errors have OpenAI's form, and say nothing of the server's insides."""

import asyncio
import json

import pytest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from mor.server import errors
from mor.server.errors import ApiError, ErrorBody


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (504, "timeout_error"),
    ],
)
def test_an_error_has_a_type_by_its_status(status, kind):
    error = ApiError(status, "why", param="n", code="c", headers={"Retry-After": "1"})
    found = error.response()
    assert found.status_code == status and found.headers["retry-after"] == "1"
    assert json.loads(found.body) == {
        "error": {"message": "why", "type": kind, "param": "n", "code": "c"}
    }
    ErrorBody.model_validate_json(found.body)


def answer(handler, error):
    found = asyncio.run(handler(None, error))
    return found.status_code, json.loads(found.body)["error"]


def test_what_others_raise_gets_the_same_form():
    status, said = answer(errors.answer_http_error, HTTPException(405))
    assert status == 405 and "method" in said["message"]
    status, said = answer(errors.answer_unforeseen, OSError("/secret/place"))
    assert status == 500 and "secret" not in said["message"]
    wrong = {"loc": ("body", "stop", 0), "msg": "Value error, too short", "type": "value_error"}
    status, said = answer(errors.answer_invalid, RequestValidationError([wrong]))
    assert (status, said["param"], said["message"]) == (400, "stop", "stop: too short")
    broken = {"loc": ("body", 7), "msg": "JSON decode error", "type": "json_invalid"}
    status, said = answer(errors.answer_invalid, RequestValidationError([broken]))
    assert (said["param"], said["message"]) == (None, "the body is not valid JSON")
