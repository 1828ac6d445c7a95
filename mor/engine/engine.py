"""Many requests through one model: the interface, and what every step strategy shares.

An engine admits requests, reads their prompts in chunks, and leaves the making of new tokens to a
strategy: by_load.py, depth_wise.py, device_loop.py or lock_step.py.

A rows that hold tokens · B rows of the batch · R recursions · T columns · V vocab
"""

from __future__ import annotations

import os
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mor.answer import Answer
from mor.costs import flops as costs
from mor.data.tokenizer import Tokenizer
from mor.engine.attention import AttentionBackend, decode_attention
from mor.engine.by_load import ByLoad
from mor.engine.depth_wise import DepthWise
from mor.engine.device_loop import DeviceLoop
from mor.engine.lock_step import LockStep, StaticBatches
from mor.engine.paged_kv import PagedKV, default_memory, has_view
from mor.engine.pages import SHARED
from mor.engine.prefix_cache import PrefixCache
from mor.engine.request import Phase, Request, RequestOutput, Status
from mor.engine.runner import Runner
from mor.engine.sampling import finite_rows, score_rows
from mor.engine.scheduler import Scheduler
from mor.engine.strategy import Strategy, Work, not_finite
from mor.engine.weights import Watch, compiles, for_decoding
from mor.files import naming
from mor.generation import (
    PositiveDepth,
    SamplingParams,
    begin,
    check_budget,
    per_prompt,
)
from mor.model.budget import Budget, Depth, has_depths
from mor.model.compiling import failed_to_compile, what_failed
from mor.model.transformer import Output, Transformer
from mor.settings import PositiveInt, Settings

Batching = Literal["auto", "depth_wise", "lock_step", "static"]
Loop = Literal["auto", "host", "device"]

STRATEGIES: dict[tuple[str, str], type[Strategy]] = {
    ("auto", "host"): ByLoad,
    ("auto", "device"): DeviceLoop,
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
    depth: PositiveDepth | Literal["full"] | None = None
    """Mean depth of requests that name none (SamplingParams.depth). None: the model's own rule."""
    deepest: PositiveInt | None = None
    """Recursions that a token may take with the largest depth that requests may ask for. None: the
    trained ones, or where one threshold serves all recursions (docs/depth.md) those of the model's
    table, which nearly every depth asks for. More take memory for their tables, and time in every
    pass."""
    batching: Batching = "auto"
    """depth_wise: tokens at any depth share a pass. lock_step: all sequences take their next token
    together, and finished ones are replaced at once. static: as lock_step, but a batch ends with
    its longest request. auto: lock_step while all running requests fit into the lanes, depth_wise
    while there are more; always depth_wise in the device loop."""
    loop: Loop = "auto"
    """For batching auto and depth_wise. host: Python chooses the tokens of every pass. device:
    several passes are one launch, a CUDA graph where there is CUDA. auto: device on CUDA, host
    elsewhere."""
    prefix_caching: bool = True
    """Keep the keys and values of prompts for others with the same beginning."""
    attention: AttentionBackend = "auto"
    """The kernel for decoding. auto: the fastest that works here."""
    quantize: Literal["int8"] | None = None
    """int8: weights of layers and head in 8 bits, activations quantized on the fly (CPU)."""
    compile: bool | None = None
    """Compile all but attention and sampling: the first launches take a minute or two, the others
    have fewer kernels. None: on CUDA where Triton is installed, and not if it fails."""

    def __post_init__(self) -> None:
        if self.loop == "device" and (self.batching, self.loop) not in STRATEGIES:
            raise ValueError(
                f"loop='device' is made for batching='depth_wise', not {self.batching!r}; use "
                "loop='host'"
            )


def _default_deepest(model: Transformer, config: EngineConfig) -> int:
    """Recursions that an engine has room for unless somebody says otherwise."""
    table, trained = model.depth_table, model.config.num_recursions
    if table is None or not model.router.one_scale or config.max_depth is not None:
        return trained
    return max(trained, table.deepest)


def _choose_strategy(config: EngineConfig, model: Transformer) -> type[Strategy]:
    loop, fits = config.loop, DeviceLoop.fits(model)
    if loop == "device" and not fits:
        raise ValueError(
            "loop='device' needs shared_order='cycle': every pass applies the same layers; use "
            "loop='host'"
        )
    if loop == "auto":
        on_cuda = model.embedding.weight.device.type == "cuda"
        there = (config.batching, "device") in STRATEGIES
        loop = "device" if on_cuda and fits and there else "host"
    return STRATEGIES[config.batching, loop]


def _check_parts(model: Transformer, tokenizer: Tokenizer | None, config: EngineConfig) -> None:
    for name, part, kind in (
        ("model", model, Transformer),
        ("tokenizer", tokenizer, Tokenizer | None),
        ("config", config, EngineConfig),
    ):
        if not isinstance(part, kind):
            raise ValueError(f"{name} cannot be of type {type(part).__name__}; see mor.Engine")
    for name, most in (
        ("max_depth", model.config.num_recursions),
        ("max_len", model.config.max_seq_len),
    ):
        value = getattr(config, name)
        if value is not None and value > most:
            raise ValueError(f"{name} must lie in 1..{most} for this model, got {value}")


def _bytes_of_machine() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Engine:
    """Serves a model to any number of requests, from any number of threads.

    tokenizer: for prompts given as text, the text of answers, stop strings and structures; requests
    of token ids without these need none.
    ``requests`` are the unfinished ones, by id. ``measured`` counts seconds, passes and tokens in
    each part of the model.
    Raises ValueError for settings that do not go with the model or its device.

    What is wrong with a request is refused when it is added. What goes wrong later ends that
    request alone, with ``finish_reason`` "error" and the reason in ``error``: logits that are not
    finite, or a step that fails with it. Only when the engine cannot go on (the device is lost) do
    all requests end, and every later call raises RuntimeError with the reason.

    A change of the model drops cached prefixes, and requests without a new token start over; those
    that have some end with an error, since the rest would come from another model. The next step
    notices modules, parameters and forward hooks that were replaced, added or removed, and changes
    in place that PyTorch counts. Changes that it does not count, such as those of
    ``parameter.data``, are noticed before an idle engine computes anything. While it is busy they
    are looked for now and then, in at most 2% of the time (see
    :class:`mor.engine.weights.Watch`); a request that ends earlier may be of both models.

    Modules with hooks, parametrizations or adapters are called as they are. Hooks on the whole
    model are refused, and so is int8 with any of them.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        config = EngineConfig() if config is None else config
        _check_parts(model, tokenizer, config)
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        self.max_len = config.max_len or model.config.max_seq_len
        self.deepest = config.deepest or _default_deepest(model, config)
        if self.deepest < model.config.num_recursions:
            raise ValueError(
                f"deepest={self.deepest} is below the model's {model.config.num_recursions} "
                "recursions, which requests without a depth take; cap those with max_depth"
            )
        if self.deepest > model.config.num_recursions and not has_depths(model.config):
            raise ValueError(
                f"deepest={self.deepest}: this model has one depth, of "
                f"{model.config.num_recursions} recursions; leave it out"
            )
        if config.max_depth is not None and self.deepest > model.config.num_recursions:
            raise ValueError("max_depth and deepest say different things; leave out one of them")
        self.budget(None)
        self._strategy = _choose_strategy(config, model)
        self._compiles = compiles(model.embedding.weight.device, config.compile)
        self._watch = Watch(model)
        with self._naming_memory():
            self.kv = self._make_cache()
        self.prefix_cache = PrefixCache(config.page_size) if config.prefix_caching else None
        self.scheduler = Scheduler(self.kv, self.prefix_cache)
        lanes = config.lanes or config.max_num_seqs
        with self._naming_memory():
            self._work = Work(self._make_runner(), self.scheduler, lanes=lanes)
        self.requests, self.measured = self._work.requests, self._work.measured
        self.strategy = self._strategy(self._work)
        self._next_number = 0
        self._lock = threading.RLock()
        self._leaving: list[Request] | None = None  # aborted during a step
        self._stopped = ""  # why, once the engine cannot go on

    @property
    def runner(self) -> Runner:
        return self._work.runner

    def _make_runner(self) -> Runner:
        return Runner(
            for_decoding(self.model, self.config.quantize, compiled=self._compiles),
            self.kv,
            compiled=self._compiles,
            max_depth=self.config.max_depth,
            longest=self.max_len if self._strategy.static_shapes else None,
        )

    @contextmanager
    def _naming_memory(self) -> Iterator[None]:
        """Say what makes an engine too large for the memory."""
        config = self.config
        sizes = f"max_num_seqs={config.max_num_seqs}, max_len={self.max_len}, "
        sizes += f"page_size={config.page_size}, kv_cache_memory={config.kv_cache_memory}"
        advice = "; lower them in EngineConfig (max_len is the model's max_seq_len unless given)"
        machine, needed = _bytes_of_machine(), self._bytes_on_host()
        if needed > machine:
            raise ValueError(
                f"{sizes} need {needed / 1e9:,.1f} GB, but the machine has {machine / 1e9:,.1f} GB"
                f"{advice}"
            )
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if not is_memory and "allocate memory" not in str(error):
                raise
            raise ValueError(f"{sizes} need more memory than there is{advice}") from error

    def _bytes_on_host(self) -> int:
        """About what the tables of slots and positions take, and keys and values on the CPU."""
        config, slots = self.model.config, self.config.max_num_seqs + 1
        weight, length = self.model.embedding.weight, self.max_len + self.config.page_size
        row = 4 * length * (1 + has_view(config)) + 64  # and lists of pages
        tables = slots * ((self.deepest + 1) * row + 4 * config.dim)
        angles = 3 * 4 * config.head_dim * self.max_len
        everything = [length] * config.num_recursions
        full = slots * costs.kv_bytes(config, length, everything, weight.dtype.itemsize)
        on_cpu = weight.device.type == "cpu"
        memory = min(self.config.kv_cache_memory or default_memory(weight.device), int(full))
        return tables + angles + memory * on_cpu

    def _make_cache(self) -> PagedKV:
        config, weight = self.config, self.model.embedding.weight
        return PagedKV(
            self.model.config,
            num_slots=config.max_num_seqs,
            max_len=self.max_len,
            page_size=config.page_size,
            num_bytes=config.kv_cache_memory or default_memory(weight.device),
            decode_attention=decode_attention(config.attention, weight.device, weight.dtype),
            device=weight.device,
            dtype=weight.dtype,
            num_recursions=self.deepest,
        )

    def add_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
    ) -> Request:
        """Queue a prompt: text, or token ids. Raises ValueError for one that the model or its cache
        can never hold (see :func:`mor.generation.check_prompt`), for settings that need a tokenizer
        if the engine has none, for a structure that cannot be followed, and for an id in use.

        request_id: None: the engine gives "#0", "#1" and so on; other ids may not begin so.
        """
        params = SamplingParams() if params is None else params
        return self._queue(self._check(prompt, params), request_id)

    def _queue(self, answer: Answer, request_id: str | None = None) -> Request:
        with self._lock:
            self._check_open()
            number = self._next_number
            if request_id is None:
                request_id = f"#{number}"
            elif not isinstance(request_id, str) or request_id.startswith("#"):
                raise ValueError(
                    "request_id must be text that does not begin with # (such ids are the "
                    f"engine's own), got {request_id!r}"
                )
            if request_id in self.requests:
                raise ValueError(
                    f"a request with id {request_id!r} is still unfinished; choose another id"
                )
            request = Request(
                request_id,
                answer,
                number,
                self.budget(answer.params.depth),
                arrival_s=time.monotonic(),
            )
            self._next_number += 1
            self.requests[request_id] = request
            self.scheduler.add(request)
            return request

    def abort(self, request: Request | str) -> RequestOutput | None:
        """End a request now, given itself or its id; None if it has ended already. Raises
        ValueError if no such request is here."""
        with self._lock:
            request_id = request.request_id if isinstance(request, Request) else request
            here = self.requests.get(request_id) if isinstance(request_id, str) else None
            if isinstance(request, Request) and here is not request:
                if request.finish_reason is not None:
                    return None
                raise ValueError(f"request {request_id!r} belongs to another engine")
            if here is None:
                raise ValueError(
                    f"no unfinished request has the id {request_id!r}; ids are text, and those "
                    "that have ended are forgotten"
                )
            if self._leaving is None:
                self._work.finish(here, "abort")
            else:  # from within a step, as when a stream that nobody holds is collected
                self._leaving.append(here)
            return RequestOutput.without_token(here)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[RequestOutput]:
        """Some work for some requests: a piece of their prompts, and what the strategy does in one
        step. Returns the new tokens, and the requests that ended with an error."""
        with self._lock:
            self._check_open()
            if self.requests:
                self._follow_model()
                self._leaving = []
                try:
                    self._work_on()
                except Exception as error:
                    self._recover(error)
                except BaseException:  # Ctrl-C: whoever goes on finds requests that wait
                    self.scheduler.restart(self.requests.values())
                    raise
                finally:
                    leaving, self._leaving = self._leaving, None
                    for request in leaving:
                        self.abort(request)
            return self._work.collect()

    def _work_on(self) -> None:
        was_idle = not self.scheduler.running
        self.strategy.admit()
        self.runner.give_budgets({r.slot: r.budget for r in self.scheduler.running})
        if was_idle and self._follow_model(thorough=True):
            return  # they wait again; nothing was computed with them
        with torch.inference_mode():
            self._read_prompts()
            self.strategy.step()

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Every new token of these prompts as soon as it is known, and an output without a token
        where one ends with an error. Stops (and aborts) when closed.

        params: one for all, or one per prompt. Raises ValueError at once if any is refused.
        """
        return self._stream(self._check_all(prompts, params))

    def _stream(self, answers: list[Answer]) -> Iterator[RequestOutput]:
        own, arrived, streams = list[Request](), deque[RequestOutput](), self._work.streams
        try:
            for answer in answers:
                own.append(self._queue(answer))
                streams[own[-1].request_id] = arrived
            while self._are_running(own) or arrived:
                if not arrived:
                    self.step()  # what it returns may be others', and others step as well
                while arrived:
                    output = arrived.popleft()
                    if output.request.finish_reason != "abort":
                        yield output
        finally:
            for request in own:
                streams.pop(request.request_id, None)
                self.abort(request)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Request]:
        """Continue prompts together; finished requests in order. Arguments as in :meth:`stream`."""
        own = list[Request]()
        try:
            for answer in self._check_all(prompts, params):
                own.append(self._queue(answer))
            while self._are_running(own):
                self.step()
        finally:
            for request in own:
                self.abort(request)
        return own

    def text(self, request: Request) -> str:
        """What a request has written, without what ended it, as far as it may be shown."""
        if self.tokenizer is None:
            raise ValueError("this engine has no tokenizer; read request.token_ids")
        return request.text

    def stats(self) -> dict[str, Any]:
        """What is going on, for logs and dashboards."""
        with self._lock:
            return self._stats()

    def _stats(self) -> dict[str, Any]:
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

    def _are_running(self, requests: Sequence[Request]) -> bool:
        with self._lock:  # no step of another thread is halfway
            return any(request.finish_reason is None for request in requests)

    def _check_all(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Answer]:
        answers = []
        for i, (prompt, own) in enumerate(zip(*per_prompt(prompts, params), strict=True)):
            with naming(f"prompt {i}"):
                answers.append(self._check(prompt, own))
        return answers

    def _check(self, prompt: str | Sequence[int], params: SamplingParams) -> Answer:
        """The answer to a prompt, before its first token. Raises ValueError if it can never be
        served."""
        given: Any = prompt
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this engine has no tokenizer; give the prompt as token ids")
            given = self.tokenizer.encode_prompt(prompt)
        answer = begin(
            self.model.config, given, params, tokenizer=self.tokenizer, max_len=self.max_len
        )
        most = self.budget(params.depth).recursions
        needed = self.kv.pages_for(len(answer.prompt_ids) + params.max_new_tokens - 1, most=most)
        there = [pool.num_pages for pool in self.kv.pools]
        if any(n > pages for n, pages in zip(needed, there, strict=True)):
            raise ValueError(
                f"the request may need {needed} pages (own layers, shared layers), but there are "
                f"{there}; shorten it or raise kv_cache_memory"
            )
        return answer

    def budget(self, depth: Depth) -> Budget:
        """What decides the depth of the tokens of a request that asks for this one. Raises
        ValueError for a depth that the model or this engine cannot have."""
        depth = self.config.depth if depth is None else depth
        budget = check_budget(self.model, depth, self.config.max_depth)
        if self.config.max_depth is not None:
            budget = replace(budget, recursions=self.config.max_depth)
        if budget.recursions > self.deepest:
            raise ValueError(
                f"depth={depth} lets tokens take up to {budget.recursions} recursions, but this "
                f"engine holds {self.deepest}; it can be made with deepest={budget.recursions} "
                f"(mor serve --deepest {budget.recursions})"
            )
        return budget

    def _check_open(self) -> None:
        if self._stopped:
            raise RuntimeError(f"this engine has stopped ({self._stopped}); make a new one")

    def _follow_model(self, *, thorough: bool = False) -> bool:
        """If the model has changed, use nothing again that was computed before, and return True.
        Raises ValueError if it has moved away from the cache."""
        if not self._watch.changed(thorough=thorough):
            return False
        weight, cached = self.model.embedding.weight, self.kv.k[SHARED][0]
        if (weight.device, weight.dtype) != (cached.device, cached.dtype):
            raise ValueError(
                f"the model is now {weight.dtype} on {weight.device}, but this engine was made for "
                f"{cached.dtype} on {cached.device}; move it back, or make a new engine"
            )
        for request in list(self.requests.values()):
            if request.token_ids:
                self._work.fail(
                    request, "the model changed (weights, modules or hooks) while it was answered"
                )
        self.scheduler.restart(self.requests.values())
        self._work.runner = self._make_runner()
        self.strategy = self._strategy(self._work)
        self._watch.note()
        return True

    def _recover(self, error: Exception) -> None:
        """After a step that failed halfway, all requests wait again: they are computed again. Those
        that run when a step fails a second time then run one by one, until it is known which of
        them is the cause."""
        if self._compiles and failed_to_compile(error):
            self._do_without_compiling(error)
            return
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        suspects = [r for r in self.requests.values() if r.status is Status.RUNNING]
        try:
            self.scheduler.restart(self.requests.values())
        except Exception:
            suspects = []
        if not suspects:
            self._stop(reason)
        elif len(suspects) == 1:
            self._work.fail(suspects[0], reason)
        else:
            for request in suspects:
                request.faults += 1
            warnings.warn(
                f"a step with {len(suspects)} requests failed and is done again: {reason}",
                stacklevel=3,
            )

    def _do_without_compiling(self, error: Exception) -> None:
        """Begin anew as it is without compiling, unless that was asked for."""
        reason = f"compiling the engine failed ({what_failed(error)})"
        if self.config.compile:
            self._stop(f"{reason}; EngineConfig(compile=False) does without")
            return
        warnings.warn(
            f"{reason}; it goes on without, which is slower. EngineConfig(compile=False) does not "
            "try",
            stacklevel=3,
        )
        self._compiles = False
        self.scheduler.restart(self.requests.values())
        self._work.runner = self._make_runner()
        self.strategy = self._strategy(self._work)

    def _stop(self, reason: str) -> None:
        """End all requests, touching nothing that may be broken."""
        self._stopped = reason
        for request in self.requests.values():
            request.status, request.finish_reason, request.error = Status.FINISHED, "error", reason
            self._work.put_out(RequestOutput.without_token(request))
        self.requests.clear()

    def _read_prompts(self) -> None:
        """Read the next ``prefill_chunk`` tokens of prompts, oldest first."""
        chunk = self._next_chunk()

        def needed(requests: list[Request]) -> list[int]:
            pages = (self.kv.pages_for(len(chunk[r.request_id]), [r.slot]) for r in requests)
            return [sum(kind) for kind in zip(*pages, strict=True)]

        requests = self.scheduler.make_room([self.requests[i] for i in chunk], needed)
        if not requests:
            return
        for group in self._read_together(requests, chunk):
            self._read(group, [chunk[r.request_id] for r in group])

    def _read_together(
        self, requests: list[Request], chunk: dict[str, list[int]]
    ) -> Iterator[list[Request]]:
        """Requests that are read in one forward: those whose prompts are scored apart from the
        others, and only so many that their logits, padded, are not many more than the tokens."""
        if others := [request for request in requests if not request.scores_prompt]:
            yield others
        group, width, most = list[Request](), 0, self._prefill_chunk
        for request in (request for request in requests if request.scores_prompt):
            width = max(width, len(chunk[request.request_id]))
            if group and width * (len(group) + 1) > most:
                yield group
                group, width = [], len(chunk[request.request_id])
            group.append(request)
        if group:
            yield group

    def _read(self, requests: list[Request], ids: list[list[int]]) -> None:
        slots, starts = [r.slot for r in requests], [r.num_read for r in requests]
        scored = requests[0].scores_prompt
        with self.measured.part("read", sum(map(len, ids))):
            output = self.runner.read(slots, ids, starts, "all" if scored else "none")
        taken_ATR = self._taken(output)
        for row, (request, part) in enumerate(zip(requests, ids, strict=True)):
            if not scored or self._score(request, output.logits_BTV[row, : len(part)]):
                self._note_read(request, taken_ATR[row, : len(part)])

    def _score(self, request: Request, logits_TV: Tensor) -> bool:
        """Note the log-probabilities of the prompt's next tokens, under the logits of the tokens
        just read. False if they are not finite: then the request has failed."""
        known = len(request.prompt_logprobs)
        following = request.prompt_ids[known : known + len(logits_TV)]
        logits_TV = logits_TV[: len(following)]
        if not finite_rows(logits_TV).all():
            self._work.fail(request, not_finite(known))
            return False
        found = score_rows(logits_TV, following, request.params.top_logprobs)
        request.prompt_logprobs += [logprob for logprob, _ in found]
        if request.params.top_logprobs:
            request.prompt_top_logprobs += [top for _, top in found]
        return True

    @property
    def _prefill_chunk(self) -> int:
        return self.config.prefill_chunk or (2048 if self.kv.device.type == "cuda" else 256)

    def _next_chunk(self) -> dict[str, list[int]]:
        """The ids that each request reads now, by request. The last token of a prompt is not among
        them: it is decoded like a new one, since its logits are needed."""
        chunk, budget = dict[str, list[int]](), self._prefill_chunk
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
        left_out = self.deepest - len(taken)  # by max_depth, or by all of their budgets
        taken += [torch.zeros_like(taken[0])] * left_out
        return torch.stack(taken, dim=-1).cpu().numpy()
