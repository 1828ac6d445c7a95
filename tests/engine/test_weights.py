"""Weights for decoding: int8, and products of few rows."""

import re

import pytest
import torch

from mor.engine import Engine, EngineConfig, SamplingParams, weights
from mor.engine import engine as engine_module
from mor.engine.weights import FewRowsLinear, Int8Linear, for_decoding, fused, with_linear
from mor.generation import generate
from tests.conftest import random_tokens, some, tiny
from tests.engine.requests import KV, all_memory_is_back, draw_requests, same


def test_int8_weights_stay_close_and_rows_apart():
    model = tiny("fixed", dim=32, head_dim=8)
    prompts, params = draw_requests(6)
    engine = Engine(model, config=EngineConfig(quantize="int8"))
    tokens = random_tokens(4, 20)
    exact, rounded = model(tokens).logits_BTV, engine.runner.model(tokens).logits_BTV
    error = float((rounded - exact).std() / exact.std())
    assert 0 < error < 0.1
    torch.testing.assert_close(engine.runner.model(tokens[:1]).logits_BTV, rounded[:1])
    assert all(r.finish_reason == "length" for r in engine.generate(prompts, params))
    with pytest.raises(ValueError, match="float32"):
        Engine(tiny().double(), config=EngineConfig(quantize="int8"))


def test_int8_weights_make_the_entries_of_tokens_that_leave():
    model = tiny(kv_strategy="final")
    prompts, params = draw_requests(6, seed=4)
    engine = Engine(model, config=EngineConfig(quantize="int8", batching="depth_wise"))
    want = generate(with_linear(model, Int8Linear), prompts, params)
    same(engine.generate(prompts, params), want)
    assert {1, 3} <= {depth for generation in want for depth in generation.depths}


def test_a_compiled_model_is_quantised_too():
    tokens = random_tokens(2, 10)
    plain = for_decoding(tiny(), "int8")(tokens).logits_BTV
    compiled = tiny().compile_blocks(backend="eager")
    quantised = for_decoding(compiled, "int8")
    torch.testing.assert_close(quantised(tokens).logits_BTV, plain)
    assert "enter" in vars(compiled.prelude[0]) and "enter" not in vars(quantised.prelude[0])


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 31, 64])
def test_few_rows_gives_the_product_at_any_number_of_rows(rows):
    weight, x = torch.randn(24, 12), torch.randn(rows, 12)
    torch.testing.assert_close(FewRowsLinear(weight)(x), x @ weight.T)


def test_few_rows_is_the_same_model_on_the_same_memory():
    model, tokens = tiny(), random_tokens(3, 10)
    fast = for_decoding(model, None)
    torch.testing.assert_close(fast(tokens).logits_BTV, model(tokens).logits_BTV)
    block, own = fast.recursions.shared_blocks[0], model.recursions.shared_blocks[0]
    assert block.feed_forward.up_proj.weight is own.feed_forward.up_proj.weight
    assert fast.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert type(own.feed_forward.up_proj) is torch.nn.Linear
    model.requires_grad_(False)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.mul_(1.1)
    torch.testing.assert_close(fast(tokens).logits_BTV, model(tokens).logits_BTV)
    assert not any(parameter.requires_grad for parameter in fast.parameters())


def add(model):
    with torch.no_grad():
        model.embedding.weight.add_(0.3)


def load(model, **settings):
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}, **settings)


def take_a_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([[1, 2, 3]])).logits_BTV.square().mean().backward()
    optimizer.step()


def set_data(model):
    model.recursions.shared_blocks[0].feed_forward.up_proj.weight.data.mul_(1.3)


def swap_rows(model):
    rows = model.embedding.weight.detach().numpy()
    rows[[5, 6]] = rows[[6, 5]]


def replace_a_layer(model):
    torch.manual_seed(0)
    model.recursions.shared_blocks[0].attention.q_proj = torch.nn.Linear(24, 24, bias=False)


CHANGES = [add, load, lambda m: load(m, assign=True), take_a_step, set_data, swap_rows]


@pytest.mark.parametrize(
    ("change", "settings"),
    some(
        [
            pytest.param(change, settings)
            for change in (*CHANGES, replace_a_layer)
            for settings in ({}, dict(quantize="int8"), dict(loop="device"))
        ],
        2,
    ),
)
def test_a_changed_model_is_noticed(change, settings):
    """Cached prefixes go, and so do copies of the weights; unchanged, the prefix is a hit."""
    model, prompt = tiny(), [5, 6, 7, 8, 9, 10, 6, 5]
    params = SamplingParams(max_new_tokens=4, temperature=0)
    engine = Engine(model, config=EngineConfig(page_size=2, **settings))
    engine.generate([prompt], params)
    assert engine.generate([prompt], params)[0].num_cached == 6
    change(model)
    (request,) = engine.generate([prompt], params)
    assert request.num_cached == 0
    fresh = Engine(model, config=EngineConfig(page_size=2, **settings))
    same([request], fresh.generate([prompt], params))
    if "quantize" not in settings:
        same([request], generate(model, [prompt], params))
    all_memory_is_back(engine)


def test_requests_under_way_when_the_model_changes():
    """Those without a token start over; the others would be the work of two models."""
    model, params = tiny(), SamplingParams(max_new_tokens=6, temperature=0)
    engine = Engine(model)
    begun = engine.add_request([1, 2, 3], params)
    while len(begun.token_ids) < 2:
        engine.step()
    new = engine.add_request([4, 5], params)
    add(model)
    (output, *_) = engine.step()
    assert output.request is begun and output.finish_reason == "error"
    assert "weights" in begun.error and len(begun.token_ids) == 2
    while engine.has_unfinished:
        engine.step()
    same([new], generate(model, [[4, 5]], params))
    all_memory_is_back(engine)


def test_a_model_that_has_moved_away_is_refused_until_it_is_back():
    model, params = tiny(), SamplingParams(max_new_tokens=3, temperature=0)
    engine = Engine(model)
    model.double()
    with pytest.raises(ValueError, match=r"now torch.float64 on cpu.*made for torch.float32"):
        engine.generate([[1]], params)
    model.float()
    same(engine.generate([[1]], params), generate(model, [[1]], params))
    with torch.inference_mode():
        unwatched = tiny()
    with pytest.raises(ValueError, match="does not count changes"):
        Engine(unwatched)


def replace_a_block(model):
    model.prelude[0] = tiny(seed=9).prelude[0]


def replace_a_parameter(model):
    model.embedding.weight = torch.nn.Parameter(-2 * model.embedding.weight.detach())


def flip_by_a_hook(model):
    model.recursions.shared_blocks[0].feed_forward.register_forward_hook(lambda m, i, o: -o)


def set_eps(model):
    model.final_norm.eps = 30.0


UNCOUNTED = [set_data, set_eps]
AT_ONCE = [add, replace_a_layer, replace_a_block, replace_a_parameter, flip_by_a_hook]


@pytest.mark.parametrize("settings", [{}, dict(loop="device")])
@pytest.mark.parametrize("change", [*AT_ONCE, *UNCOUNTED])
def test_a_busy_engine_never_mixes_two_models(change, settings, monkeypatch):
    """A further request is the new model's; the one that is half answered ends with an error."""
    monkeypatch.setattr(weights.Watch, "share", 1e9)  # a thorough look in every step
    model, prompt = tiny(), [5, 6, 7, 8, 9, 10, 6, 5]
    params = SamplingParams(max_new_tokens=4, temperature=0)
    engine = Engine(model, config=EngineConfig(page_size=2, **settings))
    engine.generate([prompt], params)
    half = engine.add_request([1], SamplingParams(max_new_tokens=60, temperature=0))
    while len(half.token_ids) < 2:
        engine.step()
    before = list(half.token_ids)
    change(model)
    (request,) = engine.generate([prompt], params)
    assert request.num_cached == 0
    same([request], generate(model, [prompt], params))
    assert half.finish_reason == "error" and "the model changed" in half.error
    assert half.token_ids == before
    all_memory_is_back(engine)


@pytest.mark.parametrize("change", [*AT_ONCE, *UNCOUNTED])
def test_a_change_is_noticed_while_the_same_requests_run(change, monkeypatch):
    monkeypatch.setattr(weights.Watch, "share", 1e9 if change in UNCOUNTED else 0)
    model = tiny()
    engine = Engine(model)
    request = engine.add_request([1], SamplingParams(max_new_tokens=60, temperature=0))
    while len(request.token_ids) < 2:
        engine.step()
    change(model)
    (output,) = engine.step()
    assert output.finish_reason == "error" and len(request.token_ids) == 2


def negate(module):
    module.register_forward_hook(lambda m, inputs, output: -output)


def scale_first(module):
    module.register_forward_pre_hook(lambda m, inputs: (-3 * inputs[0], *inputs[1:]))


def parametrize_weight(module):
    torch.nn.utils.parametrizations.weight_norm(module)
    module.parametrizations.weight.original0.data.mul_(-5)


def give_bias(module):
    module.bias = torch.nn.Parameter(torch.linspace(-1, 1, module.out_features))


def override(module):
    forward = module.forward
    module.forward = lambda *inputs: -forward(*inputs)


Q = "recursions.shared_blocks.0.attention.q_proj"
OWN_WAYS = [
    *((way, Q) for way in (negate, scale_first, parametrize_weight, give_bias, override)),
    (negate, "prelude.0.attention.o_proj"),
    (scale_first, "coda.0.feed_forward.down_proj"),
    (negate, "recursions.shared_blocks.1.feed_forward"),
    (override, "recursions.shared_blocks.1.feed_forward"),
    (negate, "recursions.shared_blocks.1.attention_norm"),
    (negate, "prelude.0"),
    (override, "coda.0"),
    (negate, "head"),
    (negate, "embedding"),
    (negate, "final_norm"),
]


@pytest.mark.parametrize(
    ("change", "name", "fuse"),
    some([pytest.param(*way, fuse) for fuse in (False, True) for way in OWN_WAYS], 2),
)
def test_modules_with_a_way_of_their_own_are_served_as_they_are(change, name, fuse, monkeypatch):
    if fuse:
        monkeypatch.setattr("mor.engine.engine.for_decoding", lambda model, *_, **__: fused(model))
    model = tiny(tie_embeddings=name != "head").eval()
    prompts, params = draw_requests(3, seed=4, temperature=1.0)
    without = generate(model, prompts, params)
    change(model.get_submodule(name))
    want = generate(model, prompts, params)
    assert [w.token_ids for w in want] != [w.token_ids for w in without]
    same(Engine(model).generate(prompts, params), want)


@pytest.mark.parametrize(("change", "name"), [*OWN_WAYS[:8], OWN_WAYS[12]])
def test_weights_in_8_bits_name_what_they_cannot_stand_in_for(change, name):
    model = tiny(tie_embeddings=name != "head")
    change(model.get_submodule(name))
    with pytest.raises(ValueError, match=f"but {name} (is a|has a) .*; merge the adapter or"):
        Engine(model, config=EngineConfig(quantize="int8"))


@pytest.mark.parametrize("name", ["", "recursions"])
@pytest.mark.parametrize("change", [negate, override])
def test_hooks_on_a_whole_forward_are_refused(change, name):
    model = tiny()
    change(model.get_submodule(name))
    with pytest.raises(ValueError, match=r"does not call the forward of .* has a"):
        Engine(model)


@pytest.mark.parametrize("fuse", [False, True])
def test_an_adapter_is_served_and_watched(fuse, monkeypatch):
    peft = pytest.importorskip("peft")
    if fuse:
        monkeypatch.setattr("mor.engine.engine.for_decoding", lambda model, *_, **__: fused(model))
    model, params = tiny().eval(), SamplingParams(max_new_tokens=8, temperature=0)
    plain = generate(model, [[1, 2, 3]], params)[0].token_ids
    names = ["q_proj", "o_proj", "up_proj", "embedding"]
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=names), model)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    engine, want = Engine(model), generate(model, [[1, 2, 3]], params)
    assert want[0].token_ids != plain
    same(engine.generate([[1, 2, 3]], params), want)
    for layer in model.modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            layer.enable_adapters(False)
    assert engine.generate([[1, 2, 3]], params)[0].token_ids == plain


@pytest.mark.parametrize("kv_strategy", KV)
def test_fused_layers_are_the_same_model(kv_strategy):
    """In a forward of their own, and in the engine: with the host's loop and the device's."""
    model, tokens = tiny(kv_strategy=kv_strategy), random_tokens(3, 10)
    joined = fused(model)
    torch.testing.assert_close(joined(tokens).logits_BTV, model(tokens).logits_BTV)
    types = {type(m) for m in (*model.modules(), *joined.modules())}
    assert {weights.FusedAttention, weights.FusedFeedForward} <= types
    assert not any(isinstance(m, weights.FusedAttention) for m in model.modules())


@pytest.mark.parametrize("kv_strategy", ["shared", "final"])
@pytest.mark.parametrize("loop", ["host", "device"])
def test_an_engine_decodes_the_same_with_fused_layers(loop, kv_strategy, monkeypatch):
    monkeypatch.setattr("mor.engine.engine.for_decoding", lambda model, *_, **__: fused(model))
    model = tiny(kv_strategy=kv_strategy)
    prompts, params = draw_requests(6, seed=4)
    engine = Engine(model, config=EngineConfig(loop=loop, max_num_seqs=4))
    same(engine.generate(prompts, params), generate(model, prompts, params))


@pytest.mark.slow
def test_fused_layers_compile_into_two_graphs():
    """``enter`` and ``leave``, whatever the layer, the recursion and the number of tokens."""
    graphs = []

    def note(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = tiny("fixed")
    compiled = fused(model).compile_blocks(backend=note)
    with torch.no_grad():
        for batch in ((3, 10), (2, 7)):
            tokens = random_tokens(*batch)
            torch.testing.assert_close(compiled(tokens).logits_BTV, model(tokens).logits_BTV)
    assert len(graphs) == 2


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_in_8_bits_are_for_the_cpu_and_are_not_compiled(compiled):
    model = tiny("fixed", dim=32, head_dim=8).to(torch.float32 if compiled else torch.bfloat16)
    with pytest.raises(ValueError, match="int8 weights need a float32 model on the CPU"):
        for_decoding(model, "int8", compiled=compiled)


@pytest.fixture
def broken_compiler(monkeypatch):
    """As where there is no C compiler, on a device where engines compile by themselves."""

    def backend(graph, inputs):
        raise OSError("no compiler was found")

    compile_by = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **settings: compile_by(f, backend=backend, **settings)
    )
    monkeypatch.setattr(
        engine_module, "compiles", lambda device, wish: True if wish is None else wish
    )
    torch._dynamo.reset()


@pytest.mark.usefixtures("broken_compiler")
@pytest.mark.parametrize("loop", ["host", "device"])
def test_an_engine_goes_on_where_compiling_fails(loop):
    model = tiny()
    prompts, params = draw_requests(5, seed=4)
    engine = Engine(model, config=EngineConfig(loop=loop, max_num_seqs=4))
    with pytest.warns(
        UserWarning, match=r"no compiler was found.*EngineConfig\(compile=False\)"
    ) as w:
        got = engine.generate(prompts, params)
    assert len(w) == 1
    same(got, generate(model, prompts, params))
    same(engine.generate(prompts, params), got)


@pytest.mark.usefixtures("broken_compiler")
def test_an_engine_that_was_told_to_compile_says_how_to_do_without():
    engine = Engine(tiny(), config=EngineConfig(compile=True))
    params = SamplingParams(max_new_tokens=2)
    (request,) = engine.generate([[1, 2, 3]], params)
    words = r"no compiler was found.*EngineConfig\(compile=False\) does without"
    assert re.search(words, request.error)
    with pytest.raises(RuntimeError, match=words):
        engine.generate([[1]], params)


@pytest.mark.slow
@pytest.mark.parametrize("kv_strategy", ["shared", "hybrid", "final"])
def test_a_compiled_engine_decodes_the_same(kv_strategy):
    """By Inductor for the CPU; on CUDA it does so by itself."""
    torch._dynamo.reset()
    model = tiny(kv_strategy=kv_strategy)
    prompts, params = draw_requests(6, seed=4, temperature=1.0)
    engine = Engine(model, config=EngineConfig(loop="device", max_num_seqs=4, compile=True))
    assert type(engine.strategy.steps._done).__name__ == "function"  # no longer a method
    same(engine.generate(prompts, params), generate(model, prompts, params))
