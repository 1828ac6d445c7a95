"""What Prometheus reads at ``/metrics``: vLLM's names with the prefix ``mor:``, and depths.

Intervals are taken by the monotonic clock of this process, between what the engine's thread saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mor.engine import Request, RequestOutput
from mor.server.engine_thread import Step

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_COUNTS = tuple(2**i for i in range(16))
_DEPTHS = (*range(9), 12, 16, 32)
_MEAN_DEPTHS = (*(i / 10 for i in range(41)), 5, 6, 8, 12, 16, 32)
_GAUGES = {
    "num_requests_running": "Requests in a slot of the engine",
    "num_requests_waiting": "Requests that wait for a slot",
    "kv_cache_usage_perc": "Share of the memory for keys and values in use; 1 is all",
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts",
    "generation_tokens": "New tokens",
    "num_preemptions": "Times that a request lost its pages and was computed again",
    "prefix_cache_queries": "Prompt tokens that were looked up among cached prefixes",
    "prefix_cache_hits": "Prompt tokens that were found there",
}
_TIMES = {
    "time_to_first_token_seconds": "From arrival to the first token",
    "inter_token_latency_seconds": "Between two tokens of a request",
    "e2e_request_latency_seconds": "From arrival to the last token",
    "request_queue_time_seconds": "From arrival to a slot",
    "request_prefill_time_seconds": "From the slot to the first token",
    "request_decode_time_seconds": "From the first token to the last",
}
_SIZES = {
    "request_prompt_tokens": "Tokens of a prompt",
    "request_generation_tokens": "New tokens of a request",
    "iteration_tokens_total": "Tokens that an engine step read or made",
    "block_batch_size": "Tokens in a pass of the shared block, mean of a step",
}


class _Times:
    """When a running request got its tokens."""

    def __init__(self) -> None:
        self.first_s: float | None = None
        self.last_s = 0.0


class Metrics:
    """Counts what an :class:`mor.server.engine_thread.EngineThread` reports."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._name = model_name
        self._gauges = {n: self._make(Gauge, n, text) for n, text in _GAUGES.items()}
        self._counters = {n: self._make(Counter, n, text) for n, text in _COUNTERS.items()}
        self._times = {
            n: self._make(Histogram, n, text, buckets=_SECONDS) for n, text in _TIMES.items()
        }
        self._sizes = {
            n: self._make(Histogram, n, text, buckets=_COUNTS) for n, text in _SIZES.items()
        }
        self._token_depth = self._make(
            Histogram, "token_depth", "Recursions behind a new token", buckets=_DEPTHS
        )
        self._spent, self._requested = (
            self._make(Histogram, f"{kind}_mean_depth", text, buckets=_MEAN_DEPTHS)
            for kind, text in (
                ("spent", "Mean recursions behind the new tokens of a request"),
                ("requested", "Mean depth that a request asked for"),
            )
        )
        self._success = Counter(
            "mor:request_success",
            "Requests by the reason of their end",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._running: dict[str, _Times] = {}
        self._preemptions = 0

    def _make(self, kind: Any, name: str, text: str, **settings: Any) -> Any:
        made = kind(f"mor:{name}", text, ["model_name"], registry=self.registry, **settings)
        return made.labels(self._name)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)

    def step(self, seen: Step) -> None:
        for request in seen.started:
            self._running[request.request_id] = _Times()
            waited_s = (request.started_s or seen.now_s) - request.arrival_s
            self._times["request_queue_time_seconds"].observe(waited_s)
            self._counters["prefix_cache_queries"].inc(len(request.prompt_ids))
            self._counters["prefix_cache_hits"].inc(request.num_cached)
        tokens = [output for output in seen.outputs if output.token_id is not None]
        self._tokens(tokens, seen.now_s)
        if seen.num_tokens:
            self._sizes["iteration_tokens_total"].observe(seen.num_tokens)
        if seen.block_batch is not None:
            self._sizes["block_batch_size"].observe(seen.block_batch)
        if seen.stats is not None:
            self._look(seen.stats)

    def _tokens(self, outputs: Sequence[RequestOutput], now_s: float) -> None:
        self._counters["generation_tokens"].inc(len(outputs))
        for output in outputs:
            self._token_depth.observe(output.source_depth)
            times = self._running.get(output.request.request_id)
            if times is None:
                continue
            if times.first_s is None:
                times.first_s = now_s
                arrival_s, started_s = output.request.arrival_s, output.request.started_s
                self._times["time_to_first_token_seconds"].observe(now_s - arrival_s)
                if started_s is not None:
                    self._times["request_prefill_time_seconds"].observe(now_s - started_s)
            else:
                self._times["inter_token_latency_seconds"].observe(now_s - times.last_s)
            times.last_s = now_s

    def ended(self, request: Request, reason: str, now_s: float) -> None:
        self._success.labels(self._name, reason).inc()
        self._counters["prompt_tokens"].inc(len(request.prompt_ids))
        self._sizes["request_prompt_tokens"].observe(len(request.prompt_ids))
        self._sizes["request_generation_tokens"].observe(len(request.token_ids))
        self._times["e2e_request_latency_seconds"].observe(now_s - request.arrival_s)
        times = self._running.pop(request.request_id, None)
        if times is not None and times.first_s is not None:
            self._times["request_decode_time_seconds"].observe(now_s - times.first_s)
        first = len(request.prompt_ids) - 1
        if spent := request.depths[first:]:
            self._spent.observe(sum(spent) / len(spent))
        if isinstance(asked := request.params.depth, float | int):
            self._requested.observe(asked)

    def _look(self, stats: dict[str, Any]) -> None:
        self._gauges["num_requests_running"].set(stats["running"])
        self._gauges["num_requests_waiting"].set(stats["waiting"])
        self._gauges["kv_cache_usage_perc"].set(stats["kv_bytes_used"] / max(1, stats["kv_bytes"]))
        preemptions = stats["preemptions"]
        self._counters["num_preemptions"].inc(preemptions - self._preemptions)
        self._preemptions = preemptions
