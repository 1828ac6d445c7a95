import functools
import importlib.util
import json
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# On some processors MKL rounds by where a matrix lies in memory: weights mapped from a file would
# give other last bits.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from mor.data.config import DataConfig
from mor.model.config import ModelConfig, RouterConfig, layout
from mor.model.transformer import Transformer

torch.set_num_threads(1)
# Shells start what runs in the background with Ctrl-C ignored, and processes of tests inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
pytest.register_assert_rewrite("tests.engine.requests")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run cross products and long runs")


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def pytest_collection_modifyitems(config, items):
    browser = CHROMIUM and importlib.util.find_spec("playwright")
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(
                pytest.mark.skip(reason="a cross product or a long run; make test-all runs it")
            )
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("browser") and not browser:
            missing = "Playwright (pip install playwright)" if CHROMIUM else "an installed Chromium"
            item.add_marker(pytest.mark.skip(reason=f"needs {missing}"))


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory):
    """One for all processes of a run of the tests, since gathering the default corpus takes a
    while."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["XDG_CACHE_HOME"] = str(base / "cache")


@pytest.fixture(autouse=True)
def one_thread():
    """Commands and benchmarks set the threads of the whole process. On busy cores small tensors
    take ten times as long with two."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def run_benchmark(monkeypatch, capsys):
    """Runs a script of benchmarks/ in this process; returns the JSON of its last line."""
    folder = Path(__file__).parent.parent / "benchmarks"

    def run(script, *arguments):
        monkeypatch.syspath_prepend(folder)  # as where a script is started
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(folder / script), run_name="__main__")
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.fixture
def undrawn(monkeypatch):
    """Figures of analyses are empty files, where a test is about the page that holds them."""

    def save(figure, folder, name):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(b"png")
        (folder / f"{name}.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")

    monkeypatch.setattr("mor.analysis.report.save", save)


@pytest.fixture(scope="module")
def browser():
    """A Chromium; for a module, as Playwright keeps an event loop running in this thread."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield started
        started.close()


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    """A small corpus to train on."""
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    rows = [{"text": f"The square of {i} is {i * i}. " * 6} for i in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(path), tokenizer="bpe", vocab_size=300)


def tiny(
    router="expert_choice",
    *,
    num_recursions=3,
    sharing="middle_cycle",
    num_layers=None,
    seed=0,
    **overrides,
):
    """A model small enough for slow references, with odd sizes and routers that really decide."""
    num_layers = num_layers or (2 if sharing.startswith("middle") else 0) + 2 * num_recursions
    router = RouterConfig(kind=router) if isinstance(router, str) else router
    settings = dict(
        vocab_size=37, dim=24, num_heads=4, num_kv_heads=2, head_dim=6, ffn_dim=40, max_seq_len=64
    )
    settings |= layout(num_layers, num_recursions, sharing) | overrides
    model = Transformer(ModelConfig(router=router, **settings)).init_weights(seed)
    with torch.no_grad():  # larger than at initialisation, so that every path shows in the logits
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model


ROUTERS = {
    "fixed": RouterConfig(),
    "expert": RouterConfig(kind="expert_choice"),
    "expert-aux-router": RouterConfig(
        kind="expert_choice", causal_selection="aux_router", gate="residual", reads="direction"
    ),
    "expert-flat": RouterConfig(kind="expert_choice", hierarchical=False, score="tanh"),
    "token": RouterConfig(kind="token_choice"),
    "token-every": RouterConfig(kind="token_choice", combination="every", score="sigmoid"),
    "random": RouterConfig(kind="random"),
    "position": RouterConfig(kind="position"),
    "frequency": RouterConfig(kind="frequency"),
    # Tokens that take no recursion at all.
    "random-from-0": RouterConfig(kind="random", capacities=(0.5, 0.3, 0.1)),
    "expert-from-0": RouterConfig(kind="expert_choice", capacities=(0.6, 0.4, 0.2)),
}
KV_STRATEGIES = ("recursion_wise", "shared", "hybrid")
FINAL = ("expert", "expert-aux-router", "token", "random")


def cases(quick="all", *, with_final=False):
    """Every router with every KV strategy and every sharing scheme that it allows: (id, model
    maker). with_final: also some with ``final``, which not every router allows.

    quick: which of them run without ``slow``. all · pairs: enough that each router meets each KV
    strategy and each sharing scheme, and these each other · singles: enough that each router, each
    strategy and each scheme is there.
    """
    found = []
    for i, (name, router) in enumerate(ROUTERS.items()):
        schemes = ["cycle", "middle_cycle", "sequence", "middle_sequence"]
        for j, sharing in enumerate(schemes if name == "fixed" else schemes[:2]):
            from_0 = router.capacities is not None
            for k, kv in enumerate(KV_STRATEGIES[:1] if from_0 else KV_STRATEGIES):
                make = _maker(router, sharing, kv)
                kept = {
                    "all": True,
                    "pairs": (i + j + k) % 2 == 0 or j > 1,
                    "singles": k == (i + j) % 3 and (j == i % 2 or j > 1),
                }[quick]
                kept = j == i % 2 if from_0 else kept
                marks = () if kept else pytest.mark.slow
                found.append(pytest.param(make, id=f"{name}-{sharing}-{kv}", marks=marks))
    gain = RouterConfig(kind="gain", architecture="mlp")
    deepened = (ROUTERS["fixed"], ROUTERS["expert"], ROUTERS["token"], gain)
    strategies = [*KV_STRATEGIES, "hybrid"]
    if with_final:
        deepened, strategies = (*deepened, gain), [*strategies, "final"]
    for router, kv in zip(deepened, strategies, strict=True):
        make = _maker(router, "middle_cycle", kv, deepened=True, lora_rank=3)
        kept = quick != "singles" or router.kind in ("token_choice", "gain")
        marks = () if kept else pytest.mark.slow
        found.append(pytest.param(make, id=f"deepened-{router.kind}-{kv}", marks=marks))
    marks = pytest.mark.slow if quick == "singles" else ()
    make = _maker(gain, "cycle", "recursion_wise")
    found.append(pytest.param(make, id="gain-cycle-recursion_wise", marks=marks))
    for name in FINAL if with_final else ():
        marks = () if quick != "singles" or name in ("expert", "random") else pytest.mark.slow
        case = pytest.param(final_maker(name), id=f"{name}-middle_cycle-final", marks=marks)
        found.append(case)
    return found


def some(params, one_in):
    """All of them; of those that run without ``slow`` only the first of every so many still do."""
    found, quick = [], 0
    for case in params:
        case = case if hasattr(case, "marks") else pytest.param(case)
        keep = bool(case.marks) or quick % one_in == 0
        quick += not case.marks
        marks = case.marks if keep else pytest.mark.slow
        found.append(pytest.param(*case.values, id=case.id, marks=marks))
    return found


def final_maker(router):
    """Makes the model of ``cases`` with this router (a name) and ``final``."""
    return _maker(ROUTERS[router], "middle_cycle", "final")


@functools.cache
def _maker(router, sharing, kv, **settings):
    """The same function at every call, so that what was found of its model can be kept."""
    return functools.partial(tiny, router, sharing=sharing, kv_strategy=kv, **settings)


def random_tokens(*shape, seed=0, vocab=37):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))
