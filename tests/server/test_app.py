"""The HTTP interface over a real connection: answers are the engine's, whatever way they come."""

import asyncio
import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from mor.engine import SamplingParams
from mor.structure import Structure
from tests.engine.requests import all_memory_is_back
from tests.server.served import NAME, SLOTS, events, make_engine, parts, running, wait_until

JSON = {"Content-Type": "application/json"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def draw_bodies(count, seed=0):
    """Random requests, greedy and seeded, whole and streamed, as text and as ids."""
    draw, found = random.Random(seed), []
    for i in range(count):
        ids = [draw.randrange(32, 127) for _ in range(draw.randint(1, 30))]
        body = {
            "prompt": draw.choice([ids, bytes(ids).decode()]),
            "max_tokens": draw.randint(1, 16),
            "temperature": draw.choice([0, 0.7, 1.0]),
            "seed": i,
            "stream": draw.random() < 0.5,
            "return_token_ids": True,
            "return_depths": True,
        }
        body |= draw.choice(
            [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.01}, {"frequency_penalty": 1.5}]
        )
        body |= draw.choice([{}, {}, {"repetition_penalty": 1.3}, {"logit_bias": {"65": 5}}])
        letters = [chr(draw.randrange(32, 127)) for _ in range(60)]
        body |= draw.choice([{}, {}, {"stop": letters}, {"stop_token_ids": [*range(0, 256, 9)]}])
        body |= draw.choice([{}, {}, {"min_tokens": body["max_tokens"] // 2}, {"ignore_eos": True}])
        body |= draw.choice([{}, {}, {"structured_outputs": {"regex": "[a-f]{2}(é|🙂)+x"}}])
        found.append(body)
    return found


def ends_of(body):
    ends = () if body.get("ignore_eos") else parts()[1].end_ids
    return tuple(dict.fromkeys((*ends, *body.get("stop_token_ids", ()))))


def structure_of(body):
    form = body.get("structured_outputs")
    return None if form is None else Structure(kind="regex", text=form["regex"])


def of_engine(bodies):
    """(token ids, depths, text) of each, by an engine without a server."""
    engine, names = make_engine(16), ("top_k", "top_p", "min_p", "repetition_penalty")
    names += ("frequency_penalty", "temperature", "seed", "stop")
    params = [
        SamplingParams(
            max_new_tokens=body["max_tokens"],
            min_new_tokens=body.get("min_tokens", 0),
            stop_token_ids=ends_of(body),
            logit_bias={int(key): bias for key, bias in body.get("logit_bias", {}).items()},
            structure=structure_of(body),
            **{name: body[name] for name in names if name in body},
        )
        for body in bodies
    ]
    made = engine.generate([body["prompt"] for body in bodies], params)
    return [(r.token_ids, r.depths[len(r.prompt_ids) - 1 :], r.text) for r in made]


def ask(client, body):
    """(token ids, depths, text) of an answer."""
    response = client.post(COMPLETIONS, json=body)
    assert response.status_code == 200, response.text
    pieces = events(response.text) if body["stream"] else [response.json()]
    choices = [piece["choices"][0] for piece in pieces]
    assert not body["stream"] or len(choices) == len([i for c in choices for i in c["token_ids"]])
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] in ("stop", "length")
    return (
        [i for c in choices for i in c["token_ids"]],
        [d for c in choices for d in c["depths"]],
        "".join(c["text"] for c in choices),
    )


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_random_requests_have_the_engine_s_tokens_depths_and_text_in_a_crowd(count, server, client):
    bodies = draw_bodies(count)
    with ThreadPoolExecutor(12) as crowd:
        found = list(crowd.map(lambda body: ask(client, body), bodies))
    assert found == of_engine(bodies)
    server.wait_until_idle()
    all_memory_is_back(server.engine)


def test_alone_an_answer_is_what_it_is_in_a_crowd(client):
    bodies = draw_bodies(20)[:4]
    assert [ask(client, body) for body in bodies] == of_engine(bodies)


def test_choices_draw_with_the_seeds_that_follow(client):
    body = {"prompt": ["abc", "de"], "max_tokens": 6, "seed": 5, "n": 2}
    choices = client.post(COMPLETIONS, json=body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    alone = [
        client.post(COMPLETIONS, json=body | {"prompt": prompt, "seed": seed, "n": None}).json()
        for prompt in ("abc", "de")
        for seed in (5, 6)
    ]
    assert [c["text"] for c in choices] == [one["choices"][0]["text"] for one in alone]


def test_the_best_of_several_is_the_likeliest(client):
    body = {"prompt": "abc", "max_tokens": 6, "seed": 5, "logprobs": 0}
    every = client.post(COMPLETIONS, json=body | {"n": 4}).json()["choices"]
    best = client.post(COMPLETIONS, json=body | {"n": 1, "best_of": 4}).json()

    def score(choice):
        logprobs = choice["logprobs"]["token_logprobs"]
        return sum(logprobs) / len(logprobs)

    assert [c["text"] for c in best["choices"]] == [max(every, key=score)["text"]]
    assert best["usage"]["completion_tokens"] == 24, "all that was written is counted"


def test_echo_scores_the_prompt_and_max_tokens_0_adds_nothing(client):
    body = {"prompt": [[65, 66, 200], [67]], "echo": True, "logprobs": 1, "max_tokens": 0}
    answer = client.post(COMPLETIONS, json=body).json()
    found = answer["choices"][0]["logprobs"]
    assert answer["choices"][0]["text"].startswith(parts()[1].decode([65, 66]))
    assert len(found["tokens"]) == 3 and found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None and found["text_offset"] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 0 and answer["usage"]["prompt_tokens"] == 4
    params = SamplingParams(max_new_tokens=1, prompt_logprobs=True, temperature=0)
    want = make_engine().generate([[65, 66, 200]], params)[0].prompt_logprobs
    assert found["token_logprobs"][1:] == pytest.approx(want[1:], abs=1e-6)
    best = [max(top.values()) for top in found["top_logprobs"][1:]]
    assert all(b >= own for b, own in zip(best, found["token_logprobs"][1:], strict=True))
    streamed = events(client.post(COMPLETIONS, json=body | {"stream": True, "max_tokens": 2}).text)
    first = [e["choices"][0] for e in streamed if e["choices"][0]["index"] == 0]
    assert first[0]["logprobs"] == found and len(first) == 3


def test_usage_comes_last_if_asked_and_tells_the_depth(client):
    body = {"prompt": "abc", "max_tokens": 4, "temperature": 0, "stream": True, "return_depths": 1}
    body["return_depths"] = True
    options = {"include_usage": True, "unknown": 1, "continuous_usage_stats": None}
    found = events(client.post(COMPLETIONS, json=body | {"stream_options": options}).text)
    *tokens, last = found
    assert last["choices"] == [] and all(event["usage"] is None for event in tokens)
    depths = [d for event in tokens for d in event["choices"][0]["depths"]]
    mean = sum(depths) / len(depths)
    assert tokens[-1]["choices"][0]["mean_depth"] == mean
    assert last["usage"]["completion_tokens_details"]["mean_depth"] == mean
    assert last["usage"]["completion_tokens"] == 4 and last["usage"]["total_tokens"] == 7
    options = {"continuous_usage_stats": True}
    found = events(client.post(COMPLETIONS, json=body | {"stream_options": options}).text)
    counts = [event["usage"]["completion_tokens"] for event in found]
    assert counts == sorted(counts) and counts[-1] == 4
    assert "usage" not in events(client.post(COMPLETIONS, json=body).text)[-1]


def test_a_chat_gets_the_template_and_its_role_event_comes_with_the_first_token(client):
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "é"}]},
        {"role": "assistant", "content": None},
    ]
    body = {"messages": turns, "max_completion_tokens": 5, "temperature": 0}
    whole = client.post(CHAT, json=body).json()
    sent = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhé<|im_end|>\n"
    sent += "<|im_start|>assistant\n<|im_end|>\n<|im_start|>assistant\n"
    ids = parts()[1].encode(sent)
    assert whole["usage"]["prompt_tokens"] == len(ids)
    assert client.post("/tokenize", json={"messages": turns}).json()["tokens"] == ids
    found = events(client.post(CHAT, json=body | {"stream": True, "n": 2}).text)
    roles, others = found[:2], found[2:]
    assert [e["choices"][0]["delta"] for e in roles] == [{"role": "assistant", "content": ""}] * 2
    assert len(others) == 10 and all("role" not in e["choices"][0]["delta"] for e in others)
    text = "".join(
        e["choices"][0]["delta"]["content"] for e in others if e["choices"][0]["index"] == 1
    )
    assert text == whole["choices"][0]["message"]["content"]


def test_a_stop_string_ends_the_text_before_it_and_is_named(client):
    body = {"prompt": "abc", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    text = client.post(COMPLETIONS, json=body).json()["choices"][0]["text"]
    stop = next(text[i : i + 2] for i in range(3, 20) if "\ufffd" not in text[i : i + 2])
    for stream in (False, True):
        response = client.post(COMPLETIONS, json=body | {"stop": ["zzz", stop], "stream": stream})
        found = events(response.text) if stream else [response.json()]
        choices = [event["choices"][0] for event in found]
        assert "".join(c["text"] for c in choices) == text[: text.index(stop)]
        assert choices[-1]["finish_reason"] == "stop" and choices[-1]["stop_reason"] == stop


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (COMPLETIONS, {"prompt": 3}, "prompt", "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt", "empty list"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt", "prompt is empty"),
        (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature", "greater than"),
        (COMPLETIONS, {"prompt": "a", "n": 1000}, "n", "may have 8"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 128}, "max_tokens", "holds 128 tokens"),
        (COMPLETIONS, {"prompt": "a" * 128}, "prompt", "prompt alone has 128"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2, "stream": True}, "best_of", "streamed"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"300": 1}}, "logit_bias", "outside 0..258"),
        (COMPLETIONS, {"prompt": "a", "stop_token_ids": [259]}, "stop_token_ids", "0..258"),
        (COMPLETIONS, {"prompt": [1, 259]}, "prompt", "outside 0..258"),
        (COMPLETIONS, {"prompt": "a", "min_tokens": 17}, "min_tokens", "min_tokens=17 is more"),
        (COMPLETIONS, {"prompt": "a", "n": 10**3000}, "n", "less than 2147483648"),
        (COMPLETIONS, {"prompt": "a" * 10**6}, "prompt", "1000000 bytes"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 10**6}]}, "messages", "bytes"),
        (COMPLETIONS, {"prompt": "a", "depth": 2.0}, "depth", "calibrate"),
        (CHAT, {"messages": []}, "messages", "at least 1"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages",
         "image_url"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools", "tools"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "audio": {"voice": "x"}}, "audio",
         "audio"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "reasoning_effort": "low"},
         "reasoning_effort", "calibrate"),
        ("/tokenize", {}, "prompt", "either"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "greater"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_with_the_field_s_name(client, path, body, param, words):
    response = client.post(path, json=body)
    error = response.json()["error"]
    assert response.status_code == 400 and words in error["message"]
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


def test_half_a_character_is_a_mistake_wherever_it_stands(client):
    half = "\ud800"
    bodies = [{"prompt": half}, {"prompt": "a", "model": half}, {half: 1, "prompt": half}]
    bodies += [{"prompt": "a", "structured_outputs": {"regex": half}}]
    for body in bodies:
        response = client.post(COMPLETIONS, content=json.dumps(body), headers=JSON)
        assert response.status_code in (400, 404) and response.json()["error"]["message"]
    turns = {"messages": [{"role": half, "content": half}]}
    assert client.post(CHAT, content=json.dumps(turns), headers=JSON).status_code == 400


def test_fields_that_are_null_or_unknown_do_no_harm_and_the_unknown_are_named(client):
    body = {"prompt": "a", "max_tokens": 1, "stop": None, "logprobs": None, "stream_options": None}
    response = client.post(COMPLETIONS, json=body | {"user": "me", "typo": 1, "bad\r\nname": 2})
    assert response.status_code == 200
    assert response.headers["warning"] == '299 mor "ignored: user, typo"'
    assert "warning" not in client.post(COMPLETIONS, json=body).headers
    tools = {"messages": [{"role": "user", "content": "a"}], "tools": [{}], "tool_choice": "none"}
    assert client.post(CHAT, json=tools | {"max_tokens": 1}).status_code == 200


def test_facts_about_the_server(client):
    assert client.get("/health").json() == {"status": "ready"}
    assert set(client.get("/version").json()) == {"version"}
    card = client.get("/v1/models").json()["data"][0]
    assert card["id"] == NAME and card == client.get(f"/v1/models/{NAME}").json()
    facts = {"num_recursions": 3, "has_chat_template": True, "depths": None}
    assert card["mor"] == facts and card["max_model_len"] == 128
    missing = client.get("/v1/models/other")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    other = client.post(COMPLETIONS, json={"model": "other", "prompt": "a"})
    assert other.status_code == 404 and other.json()["error"]["param"] == "model"
    assert client.get("/nothing").json()["error"]["message"] == "there is no such path"
    assert client.delete("/v1/models").status_code == 405
    made = client.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert made["token_strs"] == ["h", "bytes:\\xc3", "bytes:\\xa9"] and made["count"] == 3
    assert client.post("/detokenize", json=made).json() == {"prompt": "hé"}
    stats = client.get("/stats").json()
    assert {"tokens_per_second", "pages_used", "pages", "running", "waiting"} <= set(stats)


def test_the_page_and_its_files_are_served_and_no_others(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html") and "mor" in page.text
    for name in ("start.js", "look.css"):
        assert client.get(f"/page/{name}").status_code == 200
    for name in ("__init__.py", "..%2Fapp.py", "nothing.js", "a" * 300 + ".js"):
        assert client.get(f"/page/{name}").status_code == 404


def hang_up(server, body, events):
    """Read so many events of an answer (0: not even its head), then break the connection."""

    async def run():
        settings = dict(base_url=server.url, timeout=60, trust_env=False)
        async with httpx2.AsyncClient(**settings) as client:
            if not body["stream"] or not events:
                request = asyncio.create_task(client.post(COMPLETIONS, json=body))
                await asyncio.sleep(0.001 * events)
                request.cancel()
                return
            async with client.stream("POST", COMPLETIONS, json=body) as response:
                lines = response.aiter_lines()
                for _ in range(events):
                    await anext(lines)

    asyncio.run(run())


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_clients_that_leave_at_random_leave_nothing_behind(count, server):
    draw = random.Random(0)
    bodies = [
        {
            "prompt": [[draw.randrange(256)] * draw.randint(1, 20)] * draw.randint(1, 2),
            "max_tokens": 100,
            "ignore_eos": True,
            "stream": i % 2 == 0,
            "n": draw.randint(1, 2),
        }
        for i in range(count)
    ]
    with ThreadPoolExecutor(6) as crowd:
        list(crowd.map(lambda body: hang_up(server, body, draw.randint(0, 9)), bodies))
    server.wait_until_idle()
    all_memory_is_back(server.engine)
    assert not server.service.thread._answers and not server.service.metrics._running
    wait_until(lambda: len(server.server.server_state.tasks) == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages_within_two_steps(server, stream):
    engine = server.engine
    body = b'{"prompt": "abc", "max_tokens": 100, "ignore_eos": true, "stream": %s}'
    body %= str(stream).lower().encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.server.port)) as client:
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: any(len(r.token_ids) > 2 for r in list(engine.requests.values())))
        engine.may_go.clear()
        request = next(iter(engine.requests.values()))
        before = engine.steps
    wait_until(lambda: server.service.thread.num_unfinished == 0)
    engine.may_go.set()
    server.wait_until_idle()
    assert request.finish_reason == "abort" and engine.steps <= before + 2


def test_too_many_requests_are_told_to_come_back_and_those_that_wait_are_answered(server, client):
    server.engine.may_go.clear()
    body = {"prompt": "a", "max_tokens": 2, "n": SLOTS}
    with ThreadPoolExecutor(30) as crowd:
        waiting = [crowd.submit(client.post, COMPLETIONS, json=body) for _ in range(17)]
        wait_until(lambda: server.service.thread.num_unfinished == 68)
        refused = client.post(COMPLETIONS, json={"prompt": "a"})
        server.engine.may_go.set()
        assert [one.result().status_code for one in waiting] == [200] * 17
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"


def test_an_engine_that_stops_in_mid_stream_ends_it_with_an_error_and_no_done():
    with running() as server, server.client() as client:
        body = {"prompt": "a", "max_tokens": 100, "ignore_eos": True, "stream": True}
        with client.stream("POST", COMPLETIONS, json=body) as response:
            lines = response.iter_lines()
            next(lines)

            def broken():
                raise RuntimeError("lost, at /secret/place")

            server.engine.step = broken
            said = []
            with pytest.raises(httpx2.RemoteProtocolError):
                for line in lines:
                    said.append(line)
        assert '"error":{"message":"the engine has stopped"' in said[-2] and "[DONE]" not in said
        health = client.get("/health")
        assert health.status_code == 503 and health.json()["error"]["code"] == "dead"
        assert "secret" not in health.text


def test_an_answer_that_takes_too_long_ends_with_504_or_with_an_event():
    with running(request_timeout_s=0.3) as server, server.client() as client:
        server.engine.may_go.clear()
        body = {"prompt": "a", "max_tokens": 5}
        response = client.post(COMPLETIONS, json=body)
        assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
        read = b""
        broken = pytest.raises(httpx2.RemoteProtocolError)
        with broken, client.stream("POST", COMPLETIONS, json=body | {"stream": True}) as response:
            for chunk in response.iter_raw():
                read += chunk
        assert b'data: {"error"' in read and b"DONE" not in read
        server.engine.may_go.set()
        server.wait_until_idle()
        all_memory_is_back(server.engine)
