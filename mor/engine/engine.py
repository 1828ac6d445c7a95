"""Many requests through one model: the interface, and what every step strategy shares.

An engine admits requests, reads their prompts in chunks, and leaves the making of new tokens to a
strategy: depth_wise.py, device_loop.py or lock_step.py.

A rows that hold tokens · B rows of the batch · R recursions · T columns
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, Literal

import numpy as np
import torch

from mor.data.tokenizer import Tokenizer
from mor.engine.attention import AttentionBackend, decode_attention
from mor.engine.depth_wise import DepthWise
from mor.engine.device_loop import DeviceLoop
from mor.engine.lock_step import LockStep, StaticBatches
from mor.engine.paged_kv import PagedKV, default_memory
from mor.engine.prefix_cache import PrefixCache
from mor.engine.request import Phase, Request, RequestOutput
from mor.engine.runner import Runner
from mor.engine.scheduler import Scheduler
from mor.engine.strategy import Strategy, Work
from mor.engine.weights import compiles, for_decoding
from mor.generation import SamplingParams
from mor.model.transformer import Output, Transformer
from mor.settings import PositiveInt, Settings

Batching = Literal["depth_wise", "lock_step", "static"]
Loop = Literal["auto", "host", "device"]

STRATEGIES: dict[tuple[str, str], type[Strategy]] = {
    ("depth_wise", "host"): DepthWise,
    ("depth_wise", "device"): DeviceLoop,
    ("lock_step", "host"): LockStep,
    ("static", "host"): StaticBatches,
}
"""By batching and loop."""


class EngineConfig(Settings):
    """How an engine shares the machine among its requests."""

    max_num_seqs: PositiveInt = 64
    """Requests that run at a time (slots)."""
    lanes: PositiveInt | None = None
    """Most tokens in one pass of the shared block. None: as many as there are slots. With fewer
    lanes than slots, tokens that are done wait for coda and head until the others no longer fill
    the lanes."""
    prefill_chunk: PositiveInt | None = None
    """Most prompt tokens read in one step, so that running requests never wait long. None: 2048 on
    CUDA, 256 elsewhere."""
    page_size: PositiveInt = 16
    """Tokens in a page of keys and values."""
    kv_cache_memory: PositiveInt | None = None
    """Bytes for keys and values at most. None: on CUDA, 80% of what is free beside the model;
    elsewhere 1 GiB."""
    max_len: PositiveInt | None = None
    """Longest prompt and continuation together. None: what the model holds."""
    max_depth: PositiveInt | None = None
    """Caps the recursions of every token."""
    batching: Batching = "depth_wise"
    """depth_wise: tokens at any depth share a pass. lock_step: all sequences take their next token
    together, and finished ones are replaced at once. static: as lock_step, but a batch ends with
    its longest request."""
    loop: Loop = "auto"
    """For depth_wise batching. host: Python chooses the tokens of every pass. device: several
    passes are one launch, a CUDA graph where there is CUDA. auto: device on CUDA, host
    elsewhere."""
    prefix_caching: bool = True
    """Keep the keys and values of prompts for others with the same beginning."""
    attention: AttentionBackend = "auto"
    """The kernel for decoding. auto: the fastest that works here."""
    quantize: Literal["int8"] | None = None
    """int8: weights of layers and head in 8 bits, activations quantized on the fly (CPU)."""
    compile: bool | None = None
    """Compile all but attention and sampling: the first launches take a minute or two, the others
    have fewer kernels. None: on CUDA where Triton is installed."""

    def __post_init__(self) -> None:
        if self.loop == "device" and self.batching != "depth_wise":
            raise ValueError(
                f"loop='device' is made for batching='depth_wise', not {self.batching!r}; use "
                "loop='host'"
            )


def _choose_strategy(config: EngineConfig, model: Transformer) -> type[Strategy]:
    loop, fits = config.loop, DeviceLoop.fits(model)
    if loop == "device" and not fits:
        raise ValueError(
            "loop='device' needs shared_order='cycle': every pass applies the same layers; use "
            "loop='host'"
        )
    if loop == "auto":
        on_cuda = model.embedding.weight.device.type == "cuda"
        loop = "device" if on_cuda and fits and config.batching == "depth_wise" else "host"
    return STRATEGIES[config.batching, loop]


class Engine:
    """Serves a model to any number of requests. Not thread-safe: one thread adds, steps and aborts.

    tokenizer: for prompts given as text and for :meth:`text`; requests of token ids need none.
    ``requests`` are the unfinished ones, by id. ``measured`` counts seconds, passes and tokens in
    each part of the model.
    Raises ValueError for settings that do not go with the model or its device.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        self.config = config = config or EngineConfig()
        self.tokenizer = tokenizer
        self.max_len = min(config.max_len or model.config.max_seq_len, model.config.max_seq_len)
        depth, num_recursions = config.max_depth, model.config.num_recursions
        if depth is not None and not 1 <= depth <= num_recursions:
            raise ValueError(f"max_depth must lie in 1..{num_recursions}, got {depth}")
        strategy = _choose_strategy(config, model)
        self.kv = self._make_cache(model)
        compiled = compiles(self.kv.device, config.compile)
        self.runner = Runner(
            for_decoding(model.eval(), config.quantize, compiled=compiled),
            self.kv,
            compiled=compiled,
            max_depth=config.max_depth,
            longest=self.max_len if strategy.static_shapes else None,
        )
        self.prefix_cache = PrefixCache(config.page_size) if config.prefix_caching else None
        self.scheduler = Scheduler(self.kv, self.prefix_cache)
        lanes = config.lanes or config.max_num_seqs
        self._work = Work(self.runner, self.scheduler, lanes=lanes)
        self.requests, self.measured = self._work.requests, self._work.measured
        self.strategy = strategy(self._work)
        self._next_number = 0

    def _make_cache(self, model: Transformer) -> PagedKV:
        config, weight = self.config, model.embedding.weight
        return PagedKV(
            model.config,
            num_slots=config.max_num_seqs,
            max_len=self.max_len,
            page_size=config.page_size,
            num_bytes=config.kv_cache_memory or default_memory(weight.device),
            decode_attention=decode_attention(config.attention, weight.device, weight.dtype),
            device=weight.device,
            dtype=weight.dtype,
        )

    def add_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
    ) -> Request:
        """Queue a prompt: text, or token ids. Raises ValueError for one that is empty, not in the
        vocabulary or can never fit, and for an id that is in use."""
        ids = self._ids(prompt)
        if request_id is None:
            request_id = next(
                name for name in map(str, count(self._next_number)) if name not in self.requests
            )
        if request_id in self.requests:
            raise ValueError(
                f"a request with id {request_id!r} is still unfinished; choose another id"
            )
        request = Request(
            request_id,
            ids,
            params or SamplingParams(),
            self._next_number,
            arrival_s=time.monotonic(),
        )
        self._check_tokens(request)
        self._check_size(request)
        self._next_number += 1
        self.requests[request_id] = request
        self.scheduler.add(request)
        return request

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; None if it is not (or no longer) here."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        self._work.finish(request, "abort")
        return RequestOutput(request, None, None, None, "abort")

    @property
    def has_unfinished(self) -> bool:
        return bool(self.requests)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Some work for some requests: a piece of their prompts, and what the strategy does in one
        step. Returns the new tokens."""
        self.strategy.admit()
        self._read_prompts()
        self.strategy.step()
        return self._work.collect()

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Every new token of these prompts as soon as it is known. Stops (and aborts) when closed.

        params: one for all, or one per prompt. Raises ValueError before anything runs if any is
        refused.
        """
        own = self._add_all(prompts, params)
        try:
            while any(request.finish_reason is None for request in own.values()):
                for output in self.step():
                    if output.request.request_id in own and output.request.finish_reason != "abort":
                        yield output
        finally:
            for request in own.values():
                if request.finish_reason is None:
                    self.abort(request.request_id)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Request]:
        """Continue prompts together; finished requests in order. Arguments as in :meth:`stream`."""
        own = self._add_all(prompts, params)
        while any(request.finish_reason is None for request in own.values()):
            self.step()
        return list(own.values())

    def text(self, request: Request) -> str:
        """What a request has written, without its stop token."""
        if self.tokenizer is None:
            raise ValueError("this engine has no tokenizer; read request.token_ids")
        ids = request.token_ids
        if ids and ids[-1] in request.params.stop_token_ids:
            ids = ids[:-1]
        return self.tokenizer.decode(ids)

    def stats(self) -> dict[str, Any]:
        """What is going on, for logs and dashboards."""
        cache = self.prefix_cache
        return {
            "waiting": len(self.scheduler.waiting),
            "running": len(self.scheduler.running),
            "preemptions": self.scheduler.preemptions,
            "kv_bytes_used": self.kv.used_bytes,
            "kv_bytes": self.kv.nbytes,
            "prefix_segments": 0 if cache is None else len(cache),
            "prefix_hits": 0 if cache is None else cache.hits,
            "seconds": dict(self.measured.seconds),
            "passes": dict(self.measured.passes),
            "tokens": dict(self.measured.tokens),
        }

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError("this engine has no tokenizer; give the prompt as token ids")
        return self.tokenizer.encode_prompt(prompt)

    def _check_tokens(self, request: Request) -> None:
        ids, vocab_size = request.prompt_ids, self.runner.model.config.vocab_size
        if not ids:
            raise ValueError(
                "the prompt is empty; give at least one token, such as the end-of-text token"
            )
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise ValueError(f"the prompt has token ids outside 0..{vocab_size - 1}")
        stops, most = len(request.params.stop_token_ids), self.strategy.max_stop_tokens
        if most is not None and stops > most:
            raise ValueError(
                f"loop='device' takes up to {most} stop tokens, got {stops}; use loop='host'"
            )

    def _check_size(self, request: Request) -> None:
        prompt, new = len(request.prompt_ids), request.params.max_new_tokens
        if prompt + new > self.max_len:
            raise ValueError(
                f"the prompt has {prompt} tokens and asks for {new} more, but a request holds "
                f"{self.max_len} at most; shorten the prompt or lower max_new_tokens"
            )
        needed = self.kv.pages_for(request.max_length)
        there = [pool.num_pages for pool in self.kv.pools]
        if any(n > pages for n, pages in zip(needed, there, strict=True)):
            raise ValueError(
                f"the request may need {needed} pages (own layers, shared layers), but there are "
                f"{there}; shorten it or raise kv_cache_memory"
            )

    def _add_all(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> dict[str, Request]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(
                f"got {len(params)} sampling settings for {len(prompts)} prompts; give one, or one "
                "each"
            )
        own: dict[str, Request] = {}
        try:
            for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
                try:
                    request = self.add_request(prompt, p)
                except ValueError as error:
                    raise ValueError(f"prompt {i}: {error}") from error
                own[request.request_id] = request
        except Exception:
            for request_id in own:
                self.abort(request_id)
            raise
        return own

    def _read_prompts(self) -> None:
        """Read the next ``prefill_chunk`` tokens of prompts, oldest first."""
        chunk = self._next_chunk()

        def needed(requests: list[Request]) -> list[int]:
            pages = (self.kv.pages_for(len(chunk[r.request_id]), [r.slot]) for r in requests)
            return [sum(kind) for kind in zip(*pages, strict=True)]

        requests = self.scheduler.make_room([self.requests[i] for i in chunk], needed)
        if not requests:
            return
        ids = [chunk[r.request_id] for r in requests]
        slots, starts = [r.slot for r in requests], [r.num_read for r in requests]
        with self.measured.part("read", sum(map(len, ids))):
            output = self.runner.read(slots, ids, starts, "none")
        taken_ATR = self._taken(output)
        for request, part, taken_TR in zip(requests, ids, taken_ATR, strict=True):
            self._note_read(request, taken_TR[: len(part)])

    def _next_chunk(self) -> dict[str, list[int]]:
        """The ids that each request reads now, by request. The last token of a prompt is not among
        them: it is decoded like a new one, since its logits are needed."""
        on_cuda, chunk = self.kv.device.type == "cuda", dict[str, list[int]]()
        budget = self.config.prefill_chunk or (2048 if on_cuda else 256)
        for request in self._work.in_phase(Phase.READ):
            if budget:
                part = request.known_ids[request.num_read : -1][:budget]
                chunk[request.request_id] = part
                budget -= len(part)
        return chunk

    def _note_read(self, request: Request, taken_TR: np.ndarray) -> None:
        request.taken.append(taken_TR)
        request.depths += taken_TR.sum(1).tolist()
        request.num_read += len(taken_TR)
        if request.num_read == len(request.known_ids) - 1:
            self.scheduler.remember(request)
            request.phase = Phase.ENTER

    def _taken(self, output: Output) -> np.ndarray:
        """Whether each token of a forward took each recursion, (A, T, R)."""
        taken = [output.routing.selected_BT(r) for r in range(len(output.routing.steps))]
        left_out = self.runner.model.config.num_recursions - len(taken)  # by max_depth
        taken += [torch.zeros_like(taken[0])] * left_out
        return torch.stack(taken, dim=-1).cpu().numpy()
