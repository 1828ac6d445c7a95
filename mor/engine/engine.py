"""Many requests through one model: continuous depth-wise batching.

A token that needs another recursion shares the next pass of the shared block with tokens at any
other depth; a token that is done goes on to coda and head at once, and its sequence's next token
comes in.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mor.data.tokenizer import Tokenizer
from mor.engine.attention import AttentionBackend, decode_attention
from mor.engine.device_loop import MAX_STOP_TOKENS, DeviceLoop
from mor.engine.paged_kv import PagedKV
from mor.engine.pages import PrefixCache
from mor.engine.request import FinishReason, Phase, Request, RequestOutput
from mor.engine.runner import Runner
from mor.engine.sampling import SamplingRows, logprob_rows, sample_rows
from mor.engine.scheduler import Scheduler
from mor.engine.weights import for_decoding
from mor.generation import SamplingParams
from mor.model.transformer import Output, Transformer, passes
from mor.settings import PositiveInt, Settings

Batching = Literal["depth_wise", "lock_step", "static"]
Loop = Literal["auto", "host", "device"]


class EngineConfig(Settings):
    """How an engine shares the machine among its requests."""

    max_num_seqs: PositiveInt = 64
    """Requests that run at a time (slots)."""
    lanes: PositiveInt | None = None
    """Tokens in one pass of the shared block at most. None: as many as there are slots. With fewer
    lanes than slots, tokens that are done wait for coda and head until the rest no longer fills the
    lanes."""
    prefill_chunk: PositiveInt = 256
    """Prompt tokens read in one step at most, so that running requests never wait long."""
    page_size: PositiveInt = 16
    """Tokens in a page of keys and values."""
    kv_cache_memory: PositiveInt = 1 << 30
    """Bytes for keys and values."""
    max_len: PositiveInt | None = None
    """Longest prompt and continuation together. None: what the model holds."""
    max_depth: PositiveInt | None = None
    """Caps the recursions of every token."""
    batching: Batching = "depth_wise"
    """depth_wise: tokens of any depths share a pass. lock_step: all sequences take their next token
    together, and finished ones are replaced at once. static: as lock_step, but a batch ends with
    its longest request."""
    loop: Loop = "auto"
    """Of depth_wise batching. host: Python chooses the tokens of every pass. device: several passes
    are one launch, a CUDA graph where there is CUDA. auto: device on CUDA, host elsewhere."""
    prefix_caching: bool = True
    """Keep the keys and values of prompts for others that begin alike."""
    attention: AttentionBackend = "auto"
    quantize: Literal["int8"] | None = None
    """int8: weights of all layers and the head in 8 bits, activations rounded as they come
    (CPU)."""

    def __post_init__(self) -> None:
        if self.loop == "device" and self.batching != "depth_wise":
            raise ValueError(
                f"loop='device' is made for batching='depth_wise', not {self.batching!r}; use "
                "loop='host'"
            )


class Engine:
    """Serves a model to any number of requests. Not thread-safe: one thread adds, steps and aborts.

    tokenizer: for prompts given as text and for :meth:`text`; requests of token ids need none.
    ``seconds`` counts the time spent in each part of the model, ``passes`` and ``tokens`` what it
    did there.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        self.config = config = config or EngineConfig()
        self.tokenizer = tokenizer
        weight = model.embedding.weight
        self.lanes = config.lanes or config.max_num_seqs
        self.max_len = min(config.max_len or model.config.max_seq_len, model.config.max_seq_len)
        if (
            config.max_depth is not None
            and not 1 <= config.max_depth <= model.config.num_recursions
        ):
            raise ValueError(
                f"max_depth must lie in 1..{model.config.num_recursions}, got {config.max_depth}"
            )
        self.kv = PagedKV(
            model.config,
            num_slots=config.max_num_seqs,
            max_len=self.max_len,
            page_size=config.page_size,
            num_bytes=config.kv_cache_memory,
            decode_attention=decode_attention(config.attention, weight.device, weight.dtype),
            device=weight.device,
            dtype=weight.dtype,
        )
        on_device = self._runs_on_device(model, weight.device)
        longest = self.max_len if on_device else None
        model = for_decoding(model.eval(), config.quantize)
        self.runner = Runner(model, self.kv, max_depth=config.max_depth, longest=longest)
        self.device_loop = DeviceLoop(self.runner, lanes=self.lanes) if on_device else None
        self.prefix_cache = PrefixCache(config.page_size) if config.prefix_caching else None
        self.scheduler = Scheduler(
            self.kv, prefix_cache=self.prefix_cache, static=config.batching == "static"
        )
        self.requests: dict[str, Request] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.passes: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self._number = 0

    def _runs_on_device(self, model: Transformer, device: torch.device) -> bool:
        asked, layers = (
            self.config.loop,
            [layers for _, layers in passes(model.config)],
        )
        fits = self.config.batching == "depth_wise" and all(part == layers[0] for part in layers)
        if asked == "device" and not fits:
            raise ValueError(
                "loop='device' needs shared_order='cycle': every pass applies the same layers"
            )
        return fits and (asked == "device" or (asked == "auto" and device.type == "cuda"))

    def add_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
    ) -> Request:
        """Queue a prompt. Raises ValueError for one that is empty, not in the vocabulary or can
        never fit."""
        params = params or SamplingParams()
        ids = self._ids(prompt)
        if request_id is None:
            request_id = next(
                name for name in map(str, count(self._number)) if name not in self.requests
            )
        if request_id in self.requests:
            raise ValueError(
                f"a request with id {request_id!r} is still unfinished; choose another id"
            )
        request = Request(request_id, ids, params, self._number, arrival_s=time.monotonic())
        self._check(request)
        self._number += 1
        self.requests[request_id] = request
        self.scheduler.add(request)
        return request

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; None if it is not (or no longer) here."""
        request = self.requests.get(request_id)
        return None if request is None else self._finish(request, "abort")

    @property
    def has_unfinished(self) -> bool:
        return bool(self.requests)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Some work for some requests: a piece of prompts, and one pass for the running tokens."""
        outputs: list[RequestOutput] = []
        self.scheduler.admit()
        self._read()
        if self.device_loop is not None:
            self._launch(self.device_loop, outputs)
        elif self.config.batching == "depth_wise":
            self._end_tokens(outputs)
            self._pass()
        else:
            self._whole_tokens(outputs)
        return outputs

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
        """Continue prompts, all together; finished requests in their order. Arguments as in
        :meth:`stream`."""
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
        return {
            "waiting": len(self.scheduler.waiting),
            "running": len(self.scheduler.running),
            "preemptions": self.scheduler.preemptions,
            "kv_bytes_used": self.kv.used_bytes,
            "kv_bytes": self.kv.nbytes,
            "prefix_segments": len(self.prefix_cache) if self.prefix_cache is not None else 0,
            "prefix_hits": self.prefix_cache.hits if self.prefix_cache is not None else 0,
            "seconds": dict(self.seconds),
            "passes": dict(self.passes),
            "tokens": dict(self.tokens),
        }

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError("this engine has no tokenizer; give the prompt as token ids")
        return self.tokenizer.encode_prompt(prompt)

    def _check(self, request: Request) -> None:
        ids, params = request.prompt_ids, request.params
        vocab_size = self.runner.model.config.vocab_size
        if not ids:
            raise ValueError(
                "the prompt is empty; give at least one token, such as the end-of-text token"
            )
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise ValueError(f"the prompt has token ids outside 0..{vocab_size - 1}")
        if len(ids) + params.max_new_tokens > self.max_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and asks for {params.max_new_tokens} more, but "
                "a request holds "
                f"{self.max_len}; shorten the prompt or lower max_new_tokens"
            )
        if self.device_loop is not None and len(params.stop_token_ids) > MAX_STOP_TOKENS:
            raise ValueError(
                f"loop='device' takes up to {MAX_STOP_TOKENS} stop tokens, got "
                f"{len(params.stop_token_ids)}; use 'host'"
            )
        needed, pools = self.kv.pages_for(request.max_length), self.kv.pools
        if any(n > pool.num_pages for n, pool in zip(needed, pools, strict=True)):
            raise ValueError(
                f"the request may need {needed} pages (own layers, shared layers), but there are "
                f"{[pool.num_pages for pool in pools]}; shorten it or raise kv_cache_memory"
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

    def _in_phase(self, phase: Phase) -> list[Request]:
        return [request for request in self.scheduler.running if request.phase is phase]

    @contextmanager
    def _measured(self, part: str, tokens: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start
        self.passes[part] += 1
        self.tokens[part] += tokens

    def _read(self) -> None:
        """The next ``prefill_chunk`` tokens of prompts, oldest first. The last of each is decoded
        like a new one."""
        budget, chunk = self.config.prefill_chunk, dict[str, list[int]]()
        for request in self._in_phase(Phase.READ):
            if budget:
                part = request.known_ids[request.num_read : -1][:budget]
                chunk[request.request_id] = part
                budget -= len(part)

        def needed(requests: list[Request]) -> list[int]:
            pages = (self.kv.pages_for(len(chunk[r.request_id]), [r.slot]) for r in requests)
            return [sum(kind) for kind in zip(*pages, strict=True)]

        requests = self.scheduler.make_room([self.requests[i] for i in chunk], needed)
        if not requests:
            return
        ids = [chunk[r.request_id] for r in requests]
        with self._measured("read", sum(map(len, ids))):
            output = self.runner.read(
                [r.slot for r in requests], ids, [r.num_read for r in requests], "none"
            )
        took_ATR = self._took(output)
        for i, request in enumerate(requests):
            took_TR = took_ATR[i, : len(ids[i])]
            request.taken.append(took_TR)
            request.depths += took_TR.sum(1).tolist()
            request.num_read += len(ids[i])
            if request.num_read == len(request.known_ids) - 1:
                self.scheduler.remember(request)
                request.phase = Phase.ENTER

    def _took(self, output: Output) -> np.ndarray:
        """Whether each token of a forward took each recursion, (A, T, R)."""
        took = [output.routing.selected_BT(r) for r in range(len(output.routing.steps))]
        took += [torch.zeros_like(took[0])] * (self.runner.model.config.num_recursions - len(took))
        return torch.stack(took, dim=-1).cpu().numpy()

    def _end_tokens(self, outputs: list[RequestOutput]) -> None:
        """Coda and head for the tokens that are done, and their successors in, unless the lanes are
        full without."""
        if len(self._in_phase(Phase.BLOCK)) >= self.lanes:
            return
        exited = self._in_phase(Phase.CODA)
        if exited:
            slot_M = self._slots(exited)
            with self._measured("coda", len(exited)):
                x_MD = self.runner.coda(slot_M)
            with self._measured("head", len(exited)):
                logits_MV = self.runner.head(x_MD)
            for request, depth in zip(
                exited, self.runner.took_SR[slot_M].sum(1).tolist(), strict=True
            ):
                request.depths.append(depth)
                request.num_read += 1
            self._sample(exited, logits_MV, outputs)
        entering = self.scheduler.make_room(
            self._in_phase(Phase.ENTER), self._pages_to_enter, one_each=True
        )
        if entering:
            known = torch.tensor([(r.slot, r.newest_id, r.num_read) for r in entering]).to(
                self.kv.device
            )
            self.kv.reserve(*self._entries_to_enter(entering))
            with self._measured("enter", len(entering)):
                self.runner.enter(*known.unbind(1))
            self._advance(entering)

    def _pass(self) -> None:
        """One pass of the shared block: the oldest tokens that are at the same layers."""
        ready = self._in_phase(Phase.BLOCK)
        if not ready:
            return
        passes = self.runner.passes
        layers = passes[ready[0].stage][1]
        ready = [request for request in ready if passes[request.stage][1] == layers][: self.lanes]
        ready = self.scheduler.make_room(ready, self._pages_for_pass, one_each=True)
        if ready:
            self.kv.reserve(*self._entries_for_pass(ready))
            with self._measured("block", len(ready)):
                self.runner.block(self._slots(ready), layers)
            self._advance(ready)

    def _slots(self, requests: list[Request]) -> Tensor:
        return torch.tensor([request.slot for request in requests]).to(self.kv.device)

    def _advance(self, requests: list[Request]) -> None:
        self.kv.refresh()
        for request, stage in zip(
            requests, self.runner.stage_S[self._slots(requests)].tolist(), strict=True
        ):
            request.stage = stage
            request.phase = Phase.CODA if stage == len(self.runner.passes) else Phase.BLOCK

    def _launch(self, loop: DeviceLoop, outputs: list[RequestOutput]) -> None:
        """Several passes of all running requests in one launch."""

        def needed(requests: list[Request]) -> list[int]:
            return self.kv.pages_for(*self._entries_for_launch(loop, requests))

        requests = self._in_phase(Phase.ENTER) + self._in_phase(Phase.BLOCK)
        requests = self.scheduler.make_room(requests, needed)
        if not requests:
            return
        entries, slots = self._entries_for_launch(loop, requests)
        for stream in range(self.kv.num_streams):
            self.kv.reserve(np.array(slots), np.full(len(slots), stream), entries[:, stream])
        with self._measured("launch", len(requests)):
            if entering := [request for request in requests if request.phase is Phase.ENTER]:
                loop.start(entering)
            new = loop.launch(slots)
            self.kv.refresh()
        by_slot = {request.slot: request for request in requests}
        for request in requests:
            request.phase = Phase.BLOCK
        self.tokens["sample"] += len(new)
        self.tokens["block"] += sum(token.depth for token in new)
        for token in new:
            request = by_slot[token.slot]
            request.depths.append(token.depth)
            request.num_read += 1
            self._take(
                request, token.token_id, token.logprob if request.params.logprobs else None, outputs
            )

    def _entries_for_launch(
        self, loop: DeviceLoop, requests: list[Request]
    ) -> tuple[np.ndarray, list[int]]:
        """Entries that a launch adds to each stream of each request at most, (requests, streams),
        and their slots."""
        slots = [request.slot for request in requests]
        longest, read = np.array(
            [(request.max_length, request.num_read) for request in requests]
        ).T[:, :, None]
        # The token under way is not read yet, but may have entered a stream.
        return np.minimum(loop.codas + 1, longest - np.maximum(read, self.kv.count[slots])), slots

    def _whole_tokens(self, outputs: list[RequestOutput]) -> None:
        """One token of every sequence, from embedding to head."""
        requests = self.scheduler.make_room(self._in_phase(Phase.ENTER), self._pages_for_token)
        if not requests:
            return
        with self._measured("token", len(requests)):
            slots, ids = [r.slot for r in requests], [[r.newest_id] for r in requests]
            output = self.runner.read(slots, ids, [r.num_read for r in requests], "last")
        depth_B1 = output.routing.depth_BT.tolist()
        for request, (depth,) in zip(requests, depth_B1, strict=True):
            request.depths.append(depth)
            request.num_read += 1
        self._sample(requests, output.logits_BTV[:, 0], outputs)

    def _entries_to_enter(self, requests: list[Request]) -> tuple[np.ndarray, np.ndarray]:
        """The (slot, stream) pairs that get a new entry."""
        slot_M = np.array([request.slot for request in requests])
        return slot_M, np.zeros_like(slot_M)

    def _entries_for_pass(self, requests: list[Request]) -> tuple[np.ndarray, np.ndarray]:
        """A recursion of several passes gets its entry in the first."""
        recursions = [recursion for recursion, _ in self.runner.passes]
        new = [
            (r.slot, recursions[r.stage] + 1)
            for r in requests
            if recursions[r.stage] not in recursions[: r.stage]
        ]
        slot_M, stream_M = np.array(new, dtype=np.int64).reshape(-1, 2).T
        return slot_M, stream_M

    def _pages_to_enter(self, requests: list[Request]) -> list[int]:
        return self.kv.pages_for_entry(*self._entries_to_enter(requests))

    def _pages_for_pass(self, requests: list[Request]) -> list[int]:
        return self.kv.pages_for_entry(*self._entries_for_pass(requests))

    def _pages_for_token(self, requests: list[Request]) -> list[int]:
        return self.kv.pages_for(1, [request.slot for request in requests])

    def _sample(
        self, requests: list[Request], logits_MV: Tensor, outputs: list[RequestOutput]
    ) -> None:
        if not requests:
            return
        params = [request.params for request in requests]
        with self._measured("sample", len(requests)):
            if all(p.temperature == 0 for p in params):
                token_M = logits_MV.argmax(-1)
            else:
                rows = SamplingRows.of(
                    params, [len(r.token_ids) for r in requests], logits_MV.device
                )
                token_M = sample_rows(logits_MV, rows)
            asked = any(p.logprobs for p in params)
            logprobs = logprob_rows(logits_MV, token_M).tolist() if asked else [None] * len(params)
        for request, token, value in zip(requests, token_M.tolist(), logprobs, strict=True):
            request.phase = Phase.ENTER
            self._take(request, token, value if request.params.logprobs else None, outputs)

    def _take(
        self, request: Request, token: int, value: float | None, outputs: list[RequestOutput]
    ) -> None:
        """A request's next token, and its end if that was the last."""
        request.token_ids.append(token)
        if value is not None:
            request.logprobs.append(value)
        if token in request.params.stop_token_ids:
            outputs.append(self._finish(request, "stop"))
        elif len(request.token_ids) == request.params.max_new_tokens:
            outputs.append(self._finish(request, "length"))
        else:
            outputs.append(RequestOutput(request, token, request.depths[-1], value, None))

    def _last_logprob(self, request: Request) -> float | None:
        return request.logprobs[-1] if request.params.logprobs else None

    def _finish(self, request: Request, reason: FinishReason) -> RequestOutput:
        self.scheduler.finish(request)
        request.finish_reason = reason
        del self.requests[request.request_id]
        if reason == "abort":
            return RequestOutput(request, None, None, None, reason)
        return RequestOutput(
            request, request.token_ids[-1], request.depths[-1], self._last_logprob(request), reason
        )
