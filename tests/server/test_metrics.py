"""What Prometheus reads is what happened."""

import re

from tests.server.served import running


def values(text):
    """By name and labels other than the model's."""
    found = re.findall(r"^(mor:\w+)\{(.*)\} (\S+)$", text, flags=re.MULTILINE)
    return {
        (name, re.sub(r',?model_name="tiny",?', "", labels)): float(value)
        for name, labels, value in found
    }


def test_requests_tokens_depths_and_intervals_are_counted():
    with running() as server, server.client() as client:
        body = {"prompt": "abcde", "max_tokens": 6, "ignore_eos": True, "temperature": 0}
        first = client.post("/v1/completions", json=body | {"return_depths": True}).json()
        client.post("/v1/completions", json=body | {"stream": True, "n": 2})
        server.wait_until_idle()
        found = values(client.get("/metrics").text)
    depths = first["choices"][0]["depths"]
    assert found["mor:request_success_total", 'finished_reason="length"'] == 3
    assert found["mor:prompt_tokens_total", ""] == 15
    assert found["mor:generation_tokens_total", ""] == 18
    assert found["mor:token_depth_count", ""] == 18
    assert found["mor:token_depth_sum", ""] == 3 * sum(depths)
    assert found["mor:spent_mean_depth_count", ""] == 3
    assert found["mor:inter_token_latency_seconds_count", ""] == 15
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert found[f"mor:{name}_seconds_count", ""] == 3
        assert found[f"mor:{name}_seconds_sum", ""] > 0
    for name in ("request_prefill_time", "request_decode_time"):
        assert found[f"mor:{name}_seconds_count", ""] == 3
    assert found["mor:request_generation_tokens_sum", ""] == 18
    assert found["mor:num_requests_running", ""] == found["mor:num_requests_waiting", ""] == 0
    assert 0 <= found["mor:kv_cache_usage_perc", ""] < 1
    assert found["mor:prefix_cache_queries_total", ""] == 15
    assert found["mor:iteration_tokens_total_count", ""] >= 1


def test_requests_that_are_left_are_counted_as_such():
    with running() as server, server.client() as client:
        body = {"prompt": "abc", "max_tokens": 100, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
        server.wait_until_idle()
        found = values(client.get("/metrics").text)
    assert found["mor:request_success_total", 'finished_reason="abort"'] == 1
    assert not server.service.metrics._running
