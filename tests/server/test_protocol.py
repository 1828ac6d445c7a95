"""What clients send is read as they mean it."""

import json

import pytest
from pydantic import ValidationError

from mor.server.errors import ApiError
from mor.server.protocol import ChatRequest, CompletionRequest, warning_header

TURNS = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        (None, [""]),
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_a_prompt_is_a_text_ids_or_a_list_of_either(given, prompts):
    assert CompletionRequest(prompt=given).prompts == prompts


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": [1, "a"]},
        {"prompt": [[1], "a"]},
        {"prompt": "a", "temperature": float("nan")},
        {"prompt": "a", "max_tokens": "5"},
        {"prompt": "a", "stream": 1},
        {"prompt": "a", "stop": [""]},
        {"prompt": "a", "logit_bias": {"x": 1}},
    ],
)
def test_what_is_no_request_is_refused(wrong):
    with pytest.raises(ValidationError):
        CompletionRequest(**wrong)


def test_settings_have_the_engine_s_names_where_they_were_given():
    body = CompletionRequest(
        prompt="a", top_k=-1, top_p=0.5, min_tokens=2, logit_bias={"3": -100}, stop="x", min_p=0
    )
    found = {"top_k": 0, "top_p": 0.5, "min_p": 0, "min_new_tokens": 2, "stop": ("x",)}
    assert body.sampling() == found | {"logit_bias": {3: -100}}
    assert CompletionRequest(prompt="a", temperature=None).sampling() == {}


def test_the_newer_name_of_the_length_wins():
    body = ChatRequest(messages=TURNS, max_tokens=5, max_completion_tokens=7)
    assert body.wanted_length() == 7
    assert ChatRequest(messages=TURNS, max_tokens=5).wanted_length() == 5


def test_forms_become_structures_and_two_of_them_are_refused():
    schema = {"type": "object"}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    assert ChatRequest(messages=TURNS, response_format=form).structure() == (
        "json_schema",
        json.dumps(schema),
        "response_format",
    )
    for given, wanted in (
        ({"json": schema}, ("json_schema", json.dumps(schema))),
        ({"json": "{}"}, ("json_schema", "{}")),
        ({"json": False}, ("json_schema", "false")),
        ({"regex": "a+"}, ("regex", "a+")),
        ({"choice": ["a.b", "c"]}, ("regex", r"a\.b|c")),
        ({"grammar": "start: A"}, ("lark", "start: A")),
        ({"json_object": True}, ("json_object", "")),
    ):
        found = ChatRequest(messages=TURNS, structured_outputs=given).structure()
        assert found == (*wanted, "structured_outputs")
    assert ChatRequest(messages=TURNS, response_format={"type": "text"}).structure() is None
    both = ChatRequest(messages=TURNS, response_format=form, structured_outputs={"regex": "a"})
    with pytest.raises(ApiError, match="one form only"):
        both.structure()
    with pytest.raises(ApiError, match=r"json_schema\.schema"):
        ChatRequest(messages=TURNS, response_format={"type": "json_schema"}).structure()


def test_a_header_names_ignored_fields_and_none_that_could_break_it():
    body = CompletionRequest(**{"prompt": "a", "user": "x", "a b": 1, "é": 1, "c\nd": 1})
    assert warning_header(body) == {"Warning": '299 mor "ignored: user"'}
    assert warning_header(CompletionRequest(prompt="a", suffix=None)) == {}


def test_two_words_for_the_depth_are_refused():
    with pytest.raises(ApiError, match="say the same"):
        CompletionRequest(prompt="a", depth=2.0, reasoning_effort="low").check_supported()


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {"1" * 5000: 1}},
        {"logit_bias": {"\u0661": 1}},
        {"stop": ["a"] * 65},
        {"stop": "a" * 251},
        {"stop_token_ids": [1] * 1025},
        {"logit_bias": {str(i): 1 for i in range(1025)}},
        {"depth": 0.5},
        {"depth": "half"},
        {"n": 10**4000},
        {"max_tokens": 2**31},
    ],
)
def test_fields_have_limits_that_no_honest_client_reaches(fields):
    with pytest.raises(ValidationError):
        CompletionRequest(prompt="a", **fields)
    CompletionRequest(prompt="a", stop=["a" * 250] * 64, logit_bias={"1": 1}, n=2, max_tokens=5)
