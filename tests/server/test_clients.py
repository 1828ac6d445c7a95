"""Clients as they are: openai's, the protocol of vLLM's benchmark, lm-eval, and what schemathesis
makes of the OpenAPI document."""

import asyncio
import functools
import json
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import httpx2
import openai
import pytest
import requests
import torch

from mor.engine import SamplingParams
from tests.server.served import NAME, make_engine, parts, running

TURNS = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}},
    "required": ["yes"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def theirs(server):
    base = {"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0}
    with httpx2.Client(trust_env=False) as http, openai.OpenAI(**base, http_client=http) as found:
        yield found


def test_openai_chat_whole_and_streamed_say_the_same(theirs):
    body = dict(model=NAME, messages=TURNS, max_completion_tokens=6, seed=3, temperature=1)
    whole = theirs.chat.completions.create(**body, logprobs=True, top_logprobs=2, n=2)
    assert [choice.finish_reason for choice in whole.choices] == ["length"] * 2
    content = whole.choices[0].logprobs.content
    assert len(content) == 6 and all(len(c.top_logprobs) == 2 for c in content)
    assert b"".join(bytes(c.bytes) for c in content).decode(errors="replace")
    text, last = "", None
    for event in theirs.chat.completions.create(
        **body, stream=True, stream_options={"include_usage": True}
    ):
        text += event.choices[0].delta.content or "" if event.choices else ""
        last = event
    assert text == whole.choices[0].message.content
    assert last.usage.completion_tokens == 6
    assert last.usage.completion_tokens_details.mean_depth > 0


def test_openai_completions_with_stop_and_logprobs(theirs):
    body = dict(model=NAME, prompt=["ab", "cd"], max_tokens=5, temperature=0, logprobs=1)
    found = theirs.completions.create(**body, stop=["\0\0"], extra_body={"return_depths": True})
    assert [choice.index for choice in found.choices] == [0, 1]
    for choice in found.choices:
        lengths = {len(choice.logprobs.tokens), len(choice.logprobs.token_logprobs)}
        assert lengths == {len(choice.depths)}
    events = theirs.completions.create(**body, stream=True)
    texts = ["", ""]
    for event in events:
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == [choice.text for choice in found.choices]


def test_openai_structured_output_is_valid_whenever_it_finished(theirs):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    for seed in range(3):
        found = theirs.chat.completions.create(
            model=NAME, messages=TURNS, response_format=form, max_tokens=90, seed=seed
        )
        choice = found.choices[0]
        assert choice.finish_reason == "stop"
        assert json.loads(choice.message.content).keys() == {"yes"}
    picked = theirs.completions.create(
        model=NAME, prompt="a", extra_body={"structured_outputs": {"choice": ["one", "t.w*o"]}}
    )
    assert picked.choices[0].text in ("one", "t.w*o")


def test_openai_errors_are_the_classes_they_should_be(theirs):
    with pytest.raises(openai.NotFoundError, match="no model"):
        theirs.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="holds 128 tokens"):
        theirs.completions.create(model=NAME, prompt="a", max_tokens=500)
    with pytest.raises(openai.BadRequestError, match="cannot be followed"):
        theirs.completions.create(
            model=NAME, prompt="a", extra_body={"structured_outputs": {"regex": "("}}
        )
    assert [model.id for model in theirs.models.list()] == [NAME]


def test_openai_async_many_at_a_time(server):
    async def run():
        base = {"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0}
        http = httpx2.AsyncClient(trust_env=False)
        async with openai.AsyncOpenAI(**base, http_client=http) as theirs:
            body = dict(model=NAME, messages=TURNS, max_tokens=4, stream=True, temperature=0)

            async def text(seed):
                stream = await theirs.chat.completions.create(**body, seed=seed)
                return "".join([e.choices[0].delta.content or "" async for e in stream])

            return await asyncio.gather(*map(text, range(8)))

    found = asyncio.run(run())
    assert len(found) == 8 and len(set(found)) == 1


async def measured(client, path, body):
    """As vLLM's benchmark reads a stream: a time for every event with choices, counts from the
    last."""
    times, text, usage, rest = [], "", None, ""
    headers = {"Authorization": "Bearer none", "x-request-id": "bench-0"}
    async with client.stream("POST", path, json=body, headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["x-request-id"] == "bench-0"
        async for piece in response.aiter_text():
            *messages, rest = (rest + piece).split("\n\n")
            for message in messages:
                if message.startswith(":") or message == "data: [DONE]":
                    continue
                data = json.loads(message.removeprefix("data: "))
                if data["choices"]:
                    times.append(time.perf_counter())
                    choice = data["choices"][0]
                    text += choice.get("text") or choice.get("delta", {}).get("content") or ""
                elif data.get("usage"):
                    usage = data["usage"]["completion_tokens"]
    return times, text, usage


def test_the_protocol_of_vllm_bench_serve_has_an_event_for_every_token(server):
    common = {"model": NAME, "stream": True, "stream_options": {"include_usage": True}}
    common |= {"ignore_eos": True, "temperature": 0.0}
    completion = common | {"prompt": [65, 66, 67], "repetition_penalty": 1.0, "max_tokens": 12}
    completion |= {"logprobs": None}
    parts_of = [{"role": "user", "content": [{"type": "text", "text": "abc"}]}]
    chat = common | {"messages": parts_of, "max_completion_tokens": 12}

    async def run():
        base = dict(base_url=server.url, timeout=60, trust_env=False)
        async with httpx2.AsyncClient(**base) as client:
            assert (await client.get("/health")).status_code == 200
            asked = [
                measured(client, *each)
                for each in [("/v1/completions", completion), ("/v1/chat/completions", chat)] * 6
            ]
            return await asyncio.gather(*asked)

    found = asyncio.run(run())
    for place, (times, text, usage) in enumerate(found):
        role = place % 2  # a chat has one event more
        assert len(times) == 12 + role and usage == 12 and text


def test_lm_eval_s_requests_give_what_a_process_computes(server):
    """The bodies of its local-completions, and its reading of them."""
    prompts = [[65, 66, 67, 68], [69, 70, 71]]
    body = {"model": NAME, "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1}
    with server.client() as client:
        found = client.post("/v1/completions", json=body | {"seed": 1234, "echo": True}).json()
    params = SamplingParams(max_new_tokens=1, temperature=0, prompt_logprobs=True, top_logprobs=1)
    want = make_engine().generate(prompts, params)
    for choice, request in zip(found["choices"], want, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][1:-1]
        tops = choice["logprobs"]["top_logprobs"][1:-1]
        assert sum(logprobs) == pytest.approx(sum(request.prompt_logprobs[1:]), abs=1e-4)
        greedy = all(own == max(top.values()) for own, top in zip(logprobs, tops, strict=True))
        best = [top[0][0] for top in request.prompt_top_logprobs[1:]]
        assert greedy == (best == request.prompt_ids[1:])


@pytest.mark.slow  # imports lm_eval
def test_lm_eval_s_own_client_scores_as_the_model_does(server, tmp_path):
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model, tokenizer = parts()
    tokenizer.save(tmp_path)
    theirs = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model=NAME,
        tokenizer_backend="huggingface",
        tokenizer=str(tmp_path),
        max_length=100,
        batch_size=4,
    )
    pairs = [("The sky is", " blue"), ("One and", " two"), ("a", "b"), ("Some long text", " here")]
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i)
        for i, pair in enumerate(pairs)
    ]
    for (score, is_greedy), (context, continuation) in zip(
        theirs.loglikelihood(asked), pairs, strict=True
    ):
        before, ids = tokenizer.encode(context), tokenizer.encode(context + continuation)
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits_BTV[0].double().log_softmax(-1)
        rows, new = logprobs[len(before) - 1 : -1], torch.tensor(ids[len(before) :])
        want = float(rows.gather(1, new[:, None]).sum())
        assert score == pytest.approx(want, abs=1e-4)
        assert is_greedy == bool((rows.argmax(-1) == new).all())
    gen = {"until": ["\x00"], "max_gen_toks": 5, "temperature": 0}
    written = theirs.generate_until(
        [Instance(request_type="generate_until", doc={}, arguments=("The sky", gen), idx=0)]
    )
    assert len(written) == 1 and isinstance(written[0], str)


@pytest.mark.parametrize("cases", [4, pytest.param(400, marks=pytest.mark.slow)])
def test_nothing_that_the_openapi_document_allows_makes_the_server_fail(cases):
    """400 for each of the four paths with bodies and the one with a name make 2,000."""
    import schemathesis  # which takes seconds

    codes = set[int]()
    # Short answers: what is tried here are requests.
    with running(functools.partial(make_engine, max_len=24), max_choices=4) as server:
        with server.client() as client:
            schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
        for result in schema.get_all_operations():
            try_cases(result.ok(), server, cases, codes)
    assert 200 in codes and 400 in codes


def try_cases(operation, server, cases, codes):
    from hypothesis import HealthCheck, Phase, given, settings

    @given(case=operation.as_strategy())
    @settings(
        max_examples=cases if operation.body or operation.path_parameters else 1,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def holds(case):
        response = case.call(base_url=server.url, session=session)
        codes.add(response.status_code)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}

    with requests.Session() as session:
        session.trust_env = False
        holds()


PAGE = (Path(__file__).parents[2] / "docs" / "server.md").read_text()


def test_the_page_s_python_example_runs(server, capsys):
    code = re.search(r"```py\n(.*?)```", PAGE, flags=re.DOTALL)[1]
    code = code.replace("http://127.0.0.1:8000", server.url)
    exec(compile(code, "server.md", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_page_s_curl_commands_are_answered(server):
    commands = re.findall(r"^curl .*?[^\\]$", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command.replace("\\\n", " "))
        words = [word.replace("http://127.0.0.1:8000", server.url) for word in words]
        done = subprocess.run(
            [*words, "-sS", "--fail", "--noproxy", "*"], capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout, done.stderr
