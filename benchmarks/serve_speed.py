"""What the HTTP server costs: beside the engine alone, in one run, in turns.

    python benchmarks/serve_speed.py  # a few minutes on two cores
    python benchmarks/serve_speed.py --parts memory --preset tiny --tokenizer bytes
    python benchmarks/serve_speed.py --tokenizer shared/tokenizer --parts masks

The client is a process of its own. Ratios and differences are medians over rounds, in which server
and engine take turns; those called cpu are of the time that the processor spent on the server's
process, which other work on the machine disturbs less. The last line is JSON. Parts: throughput
(tokens per second of concurrent requests through HTTP, streamed and whole, against
Engine.generate), first_token (what HTTP adds to the time of the first token), masks (share of the
time that structured output takes), memory (of the process over many requests).
"""

import asyncio
import json
import multiprocessing
import os
import platform
import resource
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import httpx2
import torch
import tyro

import mor.engine.sampling
from mor.data.tokenizer import Tokenizer
from mor.engine import Engine, EngineConfig, SamplingParams
from mor.model.config import preset
from mor.model.transformer import Transformer
from mor.server.config import ServerConfig
from mor.server.run import Server
from mor.server.service import Service, serve
from mor.structure import Structure

PARTS = ("throughput", "first_token", "masks", "memory")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "size": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "size", "tags"],
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    preset: str = "smollm-135m"
    num_recursions: int = 3
    tokenizer: str = "bytes"
    """Or a folder; of the size that the model's vocabulary has, for masks that tell something."""
    concurrent: int = 16
    prompt: int = 32
    """Tokens."""
    new: int = 64
    """Tokens of an answer."""
    turns: int = 2
    """Requests in a turn, for each of the concurrent ones."""
    rounds: int = 7
    requests: int = 10_000
    """For the part memory."""
    threads: int = 1
    parts: tuple[str, ...] = PARTS
    out: Path | None = None
    """Also write the JSON there."""


# The client.


def client(connection, url):
    """Answers each order, a function's name with its arguments, with what it returns."""
    while (order := connection.recv()) is not None:
        name, *arguments = order
        connection.send(asyncio.run(globals()[name](url, *arguments)))


async def crowd(url, bodies, concurrent):
    """Send all of these requests, so many at a time."""
    left = iter(bodies)
    async with httpx2.AsyncClient(base_url=url, timeout=600, trust_env=False) as http:

        async def work():
            for body in left:
                response = await http.post("/v1/completions", json=body)
                assert response.status_code == 200, response.text

        await asyncio.gather(*(work() for _ in range(concurrent)))


async def first_event_s(url, bodies):
    """Seconds to the first event of each, one after the other."""
    times = []
    async with httpx2.AsyncClient(base_url=url, timeout=600, trust_env=False) as http:
        await http.get("/health")
        for body in bodies:
            start = time.perf_counter()
            async with http.stream("POST", "/v1/completions", json=body) as response:
                arrived = [time.perf_counter() async for _ in response.aiter_raw()]
            times.append(arrived[0] - start)
    return times


# The server.


class Served:
    """A model behind a server, a client process, and an engine of the same model beside it."""

    def __init__(self, settings):
        self.settings = settings
        tokenizer = Tokenizer.find(settings.tokenizer)
        config = preset(settings.preset, num_recursions=settings.num_recursions)
        self.model = Transformer(config).init_weights().eval()
        shape = EngineConfig(
            max_num_seqs=settings.concurrent, kv_cache_memory=1 << 28, prefix_caching=False
        )
        self.engine = Engine(self.model, tokenizer, shape)

        def make():
            torch.set_num_threads(settings.threads)
            return serve(Engine(self.model, tokenizer, shape))

        self.service = Service(make, ServerConfig(port=0), model_name="model")
        self.server = Server(self.service)
        self.thread = threading.Thread(target=self._run)

    def _run(self):
        with asyncio.Runner(loop_factory=self.server.config.get_loop_factory()) as runner:
            runner.run(self.server.serve())

    def __enter__(self):
        self.thread.start()
        while not self.server.started or self.service.thread.state == "loading":
            time.sleep(0.05)
        self.connection, theirs = multiprocessing.Pipe()
        url = self.service.config.url(self.server.port)
        self.process = multiprocessing.get_context("spawn").Process(
            target=client, args=(theirs, url)
        )
        self.process.start()
        return self

    def __exit__(self, *_):
        self.connection.send(None)
        self.process.join()
        self.server.should_exit = True
        self.thread.join()

    def order(self, *order):
        self.connection.send(order)
        return self.connection.recv()

    def prompts(self, number):
        made = torch.Generator().manual_seed(number)
        count = self.settings.concurrent * self.settings.turns
        return torch.randint(0, 256, (count, self.settings.prompt), generator=made).tolist()

    def bodies(self, number, **others):
        body = {"max_tokens": self.settings.new, "ignore_eos": True, "seed": 0} | others
        return [body | {"prompt": prompt} for prompt in self.prompts(number)]


@contextmanager
def timed(wall, cpu):
    """Add what passes on the clock, and of the processor's time for this process, the server's."""
    start, start_cpu = time.perf_counter(), time.process_time()
    yield
    wall.append(time.perf_counter() - start)
    cpu.append(time.process_time() - start_cpu)


def throughput(served):
    settings, kinds = served.settings, ("engine", "streamed", "whole")
    wall, cpu = ({kind: [] for kind in kinds} for _ in range(2))
    tokens = settings.concurrent * settings.turns * settings.new
    params = SamplingParams(max_new_tokens=settings.new)
    for number in range(settings.rounds + 1):  # the first round warms up
        for kind in kinds:
            with timed(wall[kind], cpu[kind]):
                if kind == "engine":
                    served.engine.generate(served.prompts(number), params)
                else:
                    bodies = served.bodies(number, stream=kind == "streamed")
                    served.order("crowd", bodies, settings.concurrent)
    found = {f"{kind}_tokens_per_s": tokens / median(wall[kind][1:]) for kind in kinds}
    for kind in kinds[1:]:
        for name, times in (("ratio", wall), ("cpu_ratio", cpu)):
            pairs = zip(times["engine"][1:], times[kind][1:], strict=True)
            found[f"{kind}_{name}"] = median(alone / ours for alone, ours in pairs)
    return found


def first_token(served):
    params, wall, cpu = SamplingParams(max_new_tokens=1), {}, {}
    for kind in ("engine", "server"):
        wall[kind], cpu[kind] = [], []
    for number in range(served.settings.rounds + 1):
        for body in served.bodies(number, stream=True, max_tokens=1)[:8]:
            with timed(wall["engine"], cpu["engine"]):
                served.engine.generate([body["prompt"]], params)
            with timed([], cpu["server"]):
                wall["server"] += served.order("first_event_s", [body])
    found = {}
    for name, times in (("", wall), ("cpu_", cpu)):
        engine, server = (1e3 * median(times[kind][8:]) for kind in ("engine", "server"))
        pairs = zip(times["engine"][8:], times["server"][8:], strict=True)
        added = 1e3 * median(ours - alone for alone, ours in pairs)
        found |= {f"{name}engine_ms": engine, f"{name}server_ms": server, f"{name}added_ms": added}
    return found


def masks(served):
    """Time inside the making of masks, as a share of the steps that need them."""
    settings, spent = served.settings, [0.0]
    real = mor.engine.sampling.allowed_rows

    def noted(*arguments):
        start = time.perf_counter()
        found = real(*arguments)
        spent[0] += time.perf_counter() - start
        return found

    structure = Structure(kind="json_schema", text=json.dumps(SCHEMA))
    params = SamplingParams(max_new_tokens=settings.new, structure=structure)
    shares = []
    mor.engine.sampling.allowed_rows = noted
    try:
        for number in range(settings.rounds + 1):
            spent[0], start = 0.0, time.perf_counter()
            served.engine.generate(served.prompts(number), params)
            shares.append(spent[0] / (time.perf_counter() - start))
    finally:
        mor.engine.sampling.allowed_rows = real
    return {"share": median(shares[1:]), "vocab_size": served.engine.tokenizer.vocab_size}


def memory(served):
    """Resident bytes of the server's process, every tenth of the requests."""
    settings, sizes = served.settings, []
    body = {"max_tokens": 2, "prompt": [65] * 4, "logprobs": 2}
    bodies = [body | {"seed": i, "stream": i % 2 == 0} for i in range(settings.requests // 10)]
    for _ in range(10):
        served.order("crowd", bodies, settings.concurrent)
        sizes.append(resident_mb())
    return {
        "requests": settings.requests,
        "resident_mb": sizes,
        "grown_mb_after_first_tenth": sizes[-1] - sizes[0],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def resident_mb():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main():
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(settings.threads)
    found = {"settings": asdict(settings) | {"out": None}}
    with Served(settings) as served:
        for name in settings.parts:
            found[name] = globals()[name](served)
            print(name, found[name], flush=True)
    found["machine"] = {
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    line = json.dumps(found)
    print(line)
    if settings.out:
        settings.out.write_text(line + "\n")


if __name__ == "__main__":
    main()
