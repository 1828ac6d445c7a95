"""Costs equal the paper's figures, the real tensors, the real caches and the FLOPs really done."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mor.costs.flops import (
    Machine,
    Workload,
    backward_flops,
    costs,
    decode_seconds,
    forward_flops,
    kept_per_recursion,
    kv_bytes,
    kv_entry_bytes,
    non_embedding_params,
    sequence_workload,
    train_flops,
    unique_params,
)
from mor.model.config import RouterConfig, preset
from mor.model.kv_cache import KVCache
from mor.training.optim import freeze
from tests.conftest import cases, random_tokens, tiny


@pytest.mark.parametrize(
    ("recursions", "kv", "millions", "mflops"),
    [
        (1, "recursion_wise", 315, 833.6),
        (2, "recursion_wise", 167, 623.5),
        (3, "recursion_wise", 118, 555.6),
        (4, "recursion_wise", 98, 553.5),
        (3, "shared", 118, 536.2),
    ],
)
def test_360m_matches_the_paper(recursions, kv, millions, mflops):
    router = "fixed" if recursions == 1 else "expert_choice"
    found = costs(preset("smollm-360m", num_recursions=recursions, router=router, kv_strategy=kv))
    assert round(found.params_non_embedding / 1e6) == millions
    assert round(found.paper_mflops_per_token, 1) == mflops
    assert found.mean_depth == (recursions + 1) / 2
    assert found.num_layers == (34 if recursions == 4 else 32)


@pytest.mark.parametrize(
    ("name", "full", "mor_3", "depth"),
    [
        ("smollm-135m", 106, 42, 32),
        ("smollm-730m", 654, 252, 26),
        ("smollm-1.7b", 1611, 671, 26),
    ],
)
def test_other_sizes_match_the_paper(name, full, mor_3, depth):
    assert round(non_embedding_params(preset(name)) / 1e6) == full
    mor = preset(name, num_recursions=3, router="expert_choice")
    assert round(non_embedding_params(mor) / 1e6) == mor_3
    assert (mor.prelude_layers, mor.coda_layers, mor.num_layers) == (1, 1, depth)


def test_34_layer_vanilla_as_the_paper_counts_it():
    assert round(costs(preset("smollm-360m", num_layers=34)).paper_mflops_per_token, 1) == 885.7


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "router",
    [
        dict(kind="fixed"),
        dict(kind="random"),
        *(
            dict(kind=kind, architecture=a)
            for kind in ("expert_choice", "token_choice")
            for a in ("linear", "mlp", "wide_mlp")
        ),
        dict(kind="expert_choice", causal_selection="aux_router", architecture="mlp"),
        *(dict(kind="gain", architecture=a) for a in ("linear", "mlp", "wide_mlp")),
    ],
)
@pytest.mark.parametrize("added", [{}, dict(deepened=True), dict(deepened=True, lora_rank=3)])
def test_parameter_count_equals_the_tensors(added, router, tied):
    model = tiny(RouterConfig(**router), tie_embeddings=tied, **added)
    assert unique_params(model.config) == sum(p.numel() for p in model.parameters())
    stored = [t for n, t in model.state_dict().items() if not n.endswith(("threshold_R", "bias_R"))]
    assert unique_params(model.config) == sum(t.numel() for t in stored), "nothing is stored twice"


@pytest.mark.parametrize("make", cases("pairs", with_final=True))
def test_kv_bytes_equal_a_real_cache(make):
    model = make()
    with torch.no_grad():
        cache = KVCache(model.config, 2)
        routing = model(random_tokens(2, 15), cache=cache).routing
        kept = torch.tensor(routing.tokens_per_recursion())
        step = model(random_tokens(2, 1, seed=1), cache=cache).routing
    kept += torch.tensor(step.tokens_per_recursion())
    assert cache.nbytes == kv_bytes(model.config, 2 * 16, kept.tolist(), dtype_bytes=4)
    stored = sum(
        t[row, :length].nbytes
        for s in cache.streams
        for t in (*s.k, *s.v)
        for row, length in enumerate(s.length.tolist())
    )
    assert cache.nbytes == stored
    assert cache.allocated_nbytes == sum(t.nbytes for s in cache.streams for t in (*s.k, *s.v))


def sdpa_flops(q, k, v, *args, out_shape=None, **kwargs):
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def sdpa_backward_flops(grad, q, k, v, *args, out_shape=None, **kwargs):
    return 2 * sdpa_flops(q, k, v)


def count_flops(run):
    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        result = run()
    counts = counter.get_flop_counts()["Global"]
    total = sum(counts.values())
    assert any("attention" in str(op) or "bmm" in str(op) for op in counts), (
        "attention was not counted"
    )
    return total, result


def kernel_pairs(config, batch, width, kept):
    """(query, key) pairs as a kernel without causal credit computes them."""
    keys = kept if config.kv_strategy == "recursion_wise" else [width] * len(kept)
    return batch * width * width, [batch * k * s for k, s in zip(kept, keys, strict=True)]


def padded_pairs(queries, keys):
    """The same for rows that hold so many queries and keys: those alike are padded together, where
    padding all of them would cost over twice as much."""

    def together(rows):
        taking = [row for row in rows if queries[row]]
        most = max((queries[row] for row in taking), default=0)
        return len(taking) * most * max((keys[row] for row in rows), default=0)

    held = [row for row, count in enumerate(keys) if count]
    alike = {}
    for row in held:
        alike.setdefault(len(f"{keys[row]:b}"), []).append(row)
    apart = sum(len(rows) * max(keys[row] for row in rows) ** 2 for rows in alike.values())
    if len(held) * max(keys) ** 2 <= 2 * apart:
        return together(held)
    return sum(map(together, alike.values()))


def pairs_of(config, routing):
    """Of a whole forward: outside of the recursions, and in each of them."""
    everyone = routing.tokens.count.tolist()
    taken = [step.tokens.count.tolist() for step in routing.steps]
    is_own = config.kv_strategy == "recursion_wise"
    pairs = [padded_pairs(counts, counts if is_own else everyone) for counts in taken]
    return padded_pairs(everyone, everyone), pairs


@pytest.mark.parametrize("make", cases("singles", with_final=True))
def test_flops_of_a_training_batch_are_those_of_costs(make):
    model, batch, length = make(), 3, 20
    tokens = random_tokens(batch, length)
    forward, output = count_flops(lambda: model(tokens, selection="topk"))
    routing = output.routing
    if model.config.router.kind in ("token_choice", "gain"):  # depths differ by row
        kept = routing.tokens_per_recursion()
        own, pairs = pairs_of(model.config, routing)
    else:
        per_row = kept_per_recursion(model.config, length)
        kept = [batch * k for k in per_row]
        assert routing.tokens_per_recursion() == kept
        own, pairs = kernel_pairs(model.config, batch, length, per_row)
    work = Workload(
        tokens=batch * length, kept=kept, own_pairs=own, pairs=pairs, logits=batch * length
    )
    assert forward == forward_flops(model.config, work)


@pytest.mark.parametrize("make", cases("singles", with_final=True))
def test_padding_and_early_exits_cost_no_linear_flops(make):
    """Threshold selection, ragged rows, padding on the left: linear layers see only the tokens that
    take part."""
    model = make()
    tokens, mask = random_tokens(4, 16), torch.zeros(4, 16, dtype=torch.bool)
    for row, length in enumerate((16, 9, 3, 1)):
        mask[row, 16 - length :] = True
    total, output = count_flops(lambda: model(tokens, mask_BT=mask))
    kept = output.routing.tokens_per_recursion()
    own, pairs = pairs_of(model.config, output.routing)
    assert own == 16**2 + 9**2 + 3**2 + 1**2 < 4 * 16**2 / 2
    work = Workload(tokens=29, kept=kept, own_pairs=own, pairs=pairs, logits=29)
    assert total == forward_flops(model.config, work)
    if model.config.family == "mor":
        assert kept[-1] < kept[0] and (kept[0] == 29) == model.config.least_depth


def test_backward_costs_two_forwards():
    model = tiny("expert_choice", tie_embeddings=False)
    tokens = random_tokens(2, 12)

    def step():
        output = model(tokens, selection="topk")
        (output.logits_BTV.sum() + output.routing.weighted_loss).backward()

    kept = kept_per_recursion(model.config, 12)
    own, pairs = kernel_pairs(model.config, 2, 12, kept)
    work = Workload(tokens=24, kept=[2 * k for k in kept], own_pairs=own, pairs=pairs, logits=24)
    assert count_flops(step)[0] == 3 * forward_flops(model.config, work)


@pytest.mark.parametrize("trained", ["added", "block", "all"])
def test_what_is_frozen_costs_no_backward(trained):
    """Up to the gradients of what the first trained weights read, which are not made."""
    added = dict(num_layers=17, deepened=True, lora_rank=3, tie_embeddings=False)
    model = tiny("fixed", kv_strategy="hybrid", **added)
    freeze(model, trained)
    tokens, kept = random_tokens(2, 12), [24] * 3

    def step():
        model(tokens).logits_BTV.sum().backward()

    own, pairs = kernel_pairs(model.config, 2, 12, kept)
    pairs = [2 * 12 * 12] * 3
    work = Workload(tokens=24, kept=kept, own_pairs=own, pairs=pairs, logits=24)
    expected = forward_flops(model.config, work) + backward_flops(model.config, work, trained)
    assert 0.97 * expected <= count_flops(step)[0] <= expected
    plain = train_flops(model.config, 12)
    assert train_flops(model.config, 12, trained="added") < 0.8 * plain


def test_adapters_of_the_one_pass_cost_what_they_take():
    settings = dict(num_layers=17, num_recursions=1, lora_rank=3, lora_from=1)
    model = tiny(
        "fixed", sharing="cycle", prelude_layers=5, shared_layers=7, coda_layers=5, **settings
    )
    tokens = random_tokens(2, 12)
    freeze(model, "added")
    own, pairs = kernel_pairs(model.config, 2, 12, [12])
    work = Workload(tokens=24, kept=[24], own_pairs=own, pairs=pairs, logits=24)
    forward = forward_flops(model.config, work)
    expected = forward + backward_flops(model.config, work, "added")
    found = count_flops(lambda: model(tokens).logits_BTV.sum().backward())[0]
    assert 0.97 * expected <= found <= expected
    with torch.no_grad():
        assert count_flops(lambda: model(tokens))[0] == forward


def test_decoding_a_token_costs_what_its_depth_asks_for():
    model = tiny("expert_choice")
    tokens = random_tokens(1, 30)
    flops = {}
    with torch.no_grad():
        cache = KVCache(model.config, 1)
        for t in range(30):
            total, output = count_flops(lambda t=t: model(tokens[:, t : t + 1], cache=cache))
            routing = output.routing
            lengths = [int(s.length[0]) for s in cache.streams]
            kept = [len(s.tokens) for s in routing.steps]
            pairs = [k * n for k, n in zip(kept, lengths[1:], strict=True)]
            work = Workload(tokens=1, kept=kept, own_pairs=lengths[0], pairs=pairs, logits=1)
            assert total == forward_flops(model.config, work)
            flops.setdefault(int(routing.depth_BT), []).append(total)
    assert sorted(flops) == [1, 2, 3]
    assert max(flops[1]) < min(flops[2]) < max(flops[2]) < min(flops[3])


def test_causal_pairs_of_a_sequence():
    config = tiny("expert_choice").config
    work = sequence_workload(config, 12)
    assert (
        list(work.kept) == [12, 8, 4] and work.own_pairs == 78 and list(work.pairs) == [78, 36, 10]
    )
    shared = sequence_workload(config.replace(kv_strategy="shared"), 12)
    assert list(shared.pairs) == [78, 52, 26]


def test_router_options_enter_the_count():
    plain, aux = (
        tiny(RouterConfig(kind="expert_choice", causal_selection=c)).config
        for c in ("aux_loss", "aux_router")
    )
    difference = forward_flops(aux, sequence_workload(aux, 12)) - forward_flops(
        plain, sequence_workload(plain, 12)
    )
    assert difference == 2 * plain.dim * (12 + 12 + 8)


@pytest.mark.parametrize("kv", ["recursion_wise", "shared", "hybrid", "final"])
def test_decoding_is_bound_by_flops_or_by_bytes(kv):
    """With endless memory speed the count of a forward over one token, with endless FLOPs the bytes
    that move."""
    config = preset("tiny", num_recursions=3, router="random", kv_strategy=kv)
    context, shares = 30, (1.0, 0.5, 0.25)
    seen = [context * s if kv == "recursion_wise" else context for s in shares]
    work = Workload(
        tokens=1,
        kept=shares,
        own_pairs=context,
        pairs=[s * n for s, n in zip(shares, seen, strict=True)],
        logits=1,
    )
    common = dict(batch=4, context=context, shares=shares, dtype_bytes=4)
    fast_memory = Machine(flops_per_s=1.0, bytes_per_s=1e30)
    assert decode_seconds(config, fast_memory, **common) == pytest.approx(
        forward_flops(config, work)
    )
    fast_products = Machine(flops_per_s=1e30, bytes_per_s=1.0)
    block = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176
    read = 2 * (context + 1) + 2 * sum(s * n for s, n in zip(shares, seen, strict=True))
    left = 0.75 if kv == "final" else 0
    written = 2 * (sum(shares) + left if kv != "shared" else 1)
    weights = 2 * block + 64 * config.vocab_size + 2 * block * sum(shares)
    weights += 2 * (2 * 64 * 32) * left
    expected = 4 * weights / 4 + (read + written) * kv_entry_bytes(config, 4)
    assert decode_seconds(config, fast_products, **common) == pytest.approx(expected)
