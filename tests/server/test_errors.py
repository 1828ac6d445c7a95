"""Errors have OpenAI's form, and say nothing of the server's insides."""

import asyncio
import json

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from mor.server import errors
from mor.server.errors import ApiError, ErrorBody
from mor.server.protocol import CompletionRequest


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


def test_a_long_message_loses_its_middle():
    said = ApiError(400, "begin" + "x" * 10**6 + "end").info["message"]
    assert len(said) < 1100 and said.startswith("begin") and said.endswith("end")


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
    assert (status, said["param"], said["message"]) == (400, "stop", "stop[0]: too short")
    broken = {"loc": ("body", 7), "msg": "JSON decode error", "type": "json_invalid"}
    status, said = answer(errors.answer_invalid, RequestValidationError([broken]))
    assert (said["param"], said["message"]) == (None, "the body is not valid JSON")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": [1, "a"]}, "prompt[1]: Input should be a valid integer"),
        ({"prompt": [2**40]}, "prompt[0]: Input should be less than 2147483648"),
        ({"prompt": ["a", 1]}, "prompt[1]: Input should be a valid string"),
        ({"prompt": [[1], [2, -1]]}, "prompt[1][1]: Input should be greater than or equal to 0"),
        ({"stop": ["a", ""]}, "stop[1]: String should have at least 1 character"),
        ({"stop": 3}, "stop: Input should be a valid string"),
    ],
)
def test_of_a_field_with_several_forms_the_message_is_about_the_one_that_was_meant(fields, said):
    with pytest.raises(ValidationError) as refused:
        CompletionRequest(**fields)
    error = RequestValidationError(
        [e | {"loc": ("body", *e["loc"])} for e in refused.value.errors()]
    )
    assert answer(errors.answer_invalid, error)[1]["message"] == said
