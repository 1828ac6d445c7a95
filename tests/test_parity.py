"""The package's promise: one behaviour. Full forward = decoding = batched = padded = the
definition."""

import pytest
import torch

from mor.model.config import ModelConfig, RouterConfig
from mor.model.kv_cache import KVCache
from mor.model.transformer import Transformer
from tests.conftest import cases, random_tokens, tiny
from tests.reference import Reference


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("theta", [10_000.0, 100_000.0])
def test_vanilla_equals_transformers_llama(tied, heads, kv_heads, theta):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = ModelConfig(
        vocab_size=61,
        dim=48,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=8,
        ffn_dim=72,
        shared_layers=3,
        rope_theta=theta,
        tie_embeddings=tied,
    )
    ours = Transformer(config).init_weights(3)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=48,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=8,
            intermediate_size=72,
            num_hidden_layers=3,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
    )
    names = {
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        "attention.": "self_attn.",
        "feed_forward.": "mlp.",
    }
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
    state = {"lm_head.weight": ours.embedding.weight}
    for name, tensor in ours.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        name = name.replace("recursions.shared_blocks", "model.layers").replace(
            "embedding.", "model.embed_tokens."
        )
        name = name.replace("final_norm", "model.norm")
        state["lm_head.weight" if name == "head.weight" else name] = tensor
    llama.load_state_dict(state)

    tokens = random_tokens(3, 29, vocab=61)
    logits = ours(tokens).logits_BTV
    theirs = llama(tokens, labels=tokens)
    assert logits.std() > 0.1
    assert (logits - theirs.logits).abs().max() < 1e-5
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss - theirs.loss) < 1e-5


def definition_cases():
    expert = dict(kind="expert_choice")
    token = dict(kind="token_choice")
    routers = {
        "expert": expert,
        "expert-mlp": expert | dict(architecture="mlp", score="tanh", alpha=0.7),
        "expert-wide-none": expert | dict(architecture="wide_mlp", score="none", z_loss_weight=0.1),
        "expert-residual": expert | dict(gate="residual", alpha=1.0),
        "expert-aux-router": expert | dict(causal_selection="aux_router"),
        "expert-gain": expert
        | dict(causal_selection="gain", gate="residual", alpha=1.0, reads="direction"),
        "expert-flat": expert | dict(hierarchical=False),
        "token": token,
        "token-residual": token | dict(gate="residual", z_loss_weight=0.1),
        "token-sigmoid": token | dict(score="sigmoid", alpha=0.5, architecture="mlp"),
        "token-every": token | dict(combination="every"),
        "token-loss-free": token | dict(balancing="loss_free", reads="direction"),
    }
    found = [
        (f"{n}-{kv}", r, kv, "middle_cycle")
        for n, r in routers.items()
        for kv in ("recursion_wise", "shared", "hybrid")
    ]
    found += [
        (f"{n}-final", routers[n], "final", "middle_cycle")
        for n in ("expert", "expert-residual", "expert-gain", "token", "token-every")
    ]
    from_0 = expert | dict(capacities=(0.6, 0.4, 0.2))
    found.append(("expert-from-0", from_0, "recursion_wise", "middle_cycle"))
    found += [
        (f"{s}-{kv}", dict(kind="fixed"), kv, s)
        for kv in ("recursion_wise", "shared")
        for s in ("cycle", "sequence", "middle_cycle", "middle_sequence")
    ]
    plain = [pytest.param(r, kv, s, {}, id=name) for name, r, kv, s in found]
    added = dict(deepened=True, lora_rank=3, lora_alpha=5.0)
    return plain + [
        pytest.param(r, kv, "middle_cycle", added, id=f"deepened-{r['kind']}-{kv}")
        for r, kv in (
            (dict(kind="fixed"), "recursion_wise"),
            (expert, "hybrid"),
            (token, "shared"),
            (expert, "final"),
        )
    ]


@pytest.mark.parametrize(
    ("router", "kv", "sharing", "added", "selection"),
    [
        pytest.param(
            *case.values,
            selection,
            id=f"{case.id}-{selection}",
            marks=() if i % 2 == j else pytest.mark.slow,
        )
        for i, case in enumerate(definition_cases())
        for j, selection in enumerate(("topk", "threshold"))
    ],
)
def test_equals_the_per_token_definition_in_values_and_gradients(
    router, kv, sharing, added, selection
):
    model = tiny(
        RouterConfig(**router), kv_strategy=kv, sharing=sharing, tie_embeddings=False, **added
    ).double()
    if router["kind"] == "token_choice":
        model.router.bias_R += torch.tensor([0.0, 0.02, 0.04])
    tokens = random_tokens(1, 9)
    weights = {
        n: t.detach().clone().requires_grad_(t.is_floating_point())
        for n, t in model.state_dict().items()
    }
    probe = torch.randn(9, 37, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    output = model(tokens, selection=selection)
    losses = {name: loss.value for name, loss in output.routing.losses.items()}
    ((output.logits_BTV[0] * probe).sum() + sum(losses.values())).backward()

    logits, expected_losses, depth = Reference(weights, model.config).forward(
        tokens[0].tolist(), selection
    )
    ((logits * probe).sum() + sum(expected_losses.values())).backward()
    assert output.routing.depth_BT[0].tolist() == depth
    assert (logits - output.logits_BTV[0]).abs().max() < 1e-5
    assert losses.keys() == expected_losses.keys()
    for name, value in losses.items():
        assert abs(value - expected_losses[name]) < 1e-6, name
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        if parameter.grad is None or expected is None:  # a recursion that no token took
            assert all(g is None or not g.any() for g in (parameter.grad, expected)), name
        else:
            assert (parameter.grad - expected).abs().max() <= 1e-5 * max(
                1.0, expected.abs().max()
            ), name


def test_one_recursion_is_the_plain_model():
    plain = tiny("fixed", num_recursions=1, num_layers=4)
    split = tiny(
        "fixed", num_recursions=1, prelude_layers=1, shared_layers=2, coda_layers=1, num_layers=4
    )
    names = {
        "prelude.0": 0,
        "recursions.shared_blocks.0": 1,
        "recursions.shared_blocks.1": 2,
        "coda.0": 3,
    }
    state = plain.state_dict()
    for name in list(split.state_dict()):
        for part, layer in names.items():
            if name.startswith(part + "."):
                other = name.replace(part, f"recursions.shared_blocks.{layer}", 1)
                split.state_dict()[name].copy_(state[other])
        if not any(name.startswith(part) for part in names):
            split.state_dict()[name].copy_(state[name])
    tokens = random_tokens(2, 9)
    assert torch.equal(plain(tokens).logits_BTV, split(tokens).logits_BTV)
    assert plain.config.family == "vanilla"


@pytest.mark.parametrize(
    "kind", ["expert_choice", "token_choice", "random", "position", "frequency"]
)
@pytest.mark.parametrize("selection", ["topk", "threshold"])
def test_mor_that_keeps_all_tokens_with_gate_one_is_recursive(kind, selection, monkeypatch):
    everything = {} if kind == "token_choice" else dict(capacities=(1.0, 1.0, 1.0))
    mor = tiny(RouterConfig(kind=kind, gate="residual", alpha=1.0, **everything))
    recursive = tiny("fixed")
    recursive.load_state_dict({n: t for n, t in mor.state_dict().items() if "router" not in n})
    if kind == "expert_choice":
        mor.router.score = torch.ones_like
    if kind == "token_choice":
        mor.router.score = lambda logits: torch.ones_like(logits).index_fill(
            -1, torch.arange(logits.shape[-1] - 1), 0.0
        )
    tokens = random_tokens(2, 11)
    ours, theirs = mor(tokens, selection=selection), recursive(tokens)
    assert (ours.routing.depth_BT == 3).all()
    assert (ours.logits_BTV - theirs.logits_BTV).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("sharing", "expected"),
    [
        ("cycle", [0, 1, 2, 0, 1, 2, 0, 1, 2]),
        ("sequence", [0, 0, 0, 1, 1, 1, 2, 2, 2]),
        ("middle_cycle", ["prelude", 0, 1, 2, 0, 1, 2, 0, 1, 2, "coda"]),
        ("middle_sequence", ["prelude", 0, 0, 0, 1, 1, 1, 2, 2, 2, "coda"]),
    ],
)
def test_sharing_applies_the_layers_of_the_papers_table(sharing, expected):
    model = tiny("fixed", sharing=sharing, num_layers=len(expected))
    applied = []
    named = {model.recursions.shared_blocks[i]: i for i in range(3)}
    named |= dict.fromkeys(model.prelude, "prelude") | dict.fromkeys(model.coda, "coda")
    for block, name in named.items():
        block.register_forward_hook(lambda *_, name=name: applied.append(name))
    model(random_tokens(1, 4))
    assert applied == expected


@pytest.mark.parametrize("make", cases("pairs", with_final=True))
def test_full_forward_equals_prefill_and_decoding(make):
    model = make()
    tokens = random_tokens(3, 13)
    with torch.no_grad():
        full = model(tokens)
        for chunks in ([1] * 13, [5, 3, 1, 4]):
            cache = KVCache(model.config, 3)
            parts = [model(part, cache=cache) for part in tokens.split(chunks, dim=1)]
            logits = torch.cat([part.logits_BTV for part in parts], 1)
            depth = torch.cat([part.routing.depth_BT for part in parts], 1)
            assert torch.equal(depth, full.routing.depth_BT)
            assert (logits - full.logits_BTV).abs().max() < 1e-4
    if model.config.family == "mor":
        assert len(full.routing.depth_BT.unique()) > 1, (
            "the test says nothing if all tokens go equally deep"
        )


@pytest.mark.parametrize("selection", ["threshold", "topk"])
@pytest.mark.parametrize("make", cases("pairs", with_final=True))
def test_batch_equals_single_and_padding_changes_nothing(make, selection):
    model = make()
    lengths, width = [11, 4, 1, 8], 13
    rows = [random_tokens(1, n, seed=n) for n in lengths]
    alone = [model(row, selection=selection) for row in rows]
    for side in ("left", "right", "holes"):
        tokens, mask = random_tokens(4, width, seed=99), torch.zeros(4, width, dtype=torch.bool)
        for i, (n, row) in enumerate(zip(lengths, rows, strict=True)):
            holes = (
                torch.randperm(width, generator=torch.Generator().manual_seed(i))[:n].sort().values
            )
            place = {
                "left": torch.arange(width - n, width),
                "right": torch.arange(n),
                "holes": holes,
            }[side]
            tokens[i, place], mask[i, place] = row[0], True
        batch = model(tokens, mask_BT=mask, selection=selection)
        for i, single in enumerate(alone):
            assert torch.equal(batch.routing.depth_BT[i][mask[i]], single.routing.depth_BT[0])
            assert (batch.logits_BTV[i][mask[i]] - single.logits_BTV[0]).abs().max() < 1e-4
        assert (batch.routing.depth_BT[~mask] == 0).all()
        assert (batch.logits_BTV[~mask] == 0).all()


@pytest.mark.parametrize("make", cases("pairs", with_final=True))
def test_ragged_prompts_and_idle_rows_decode_like_single_sequences(make):
    model = make()
    lengths = [5, 9, 2]
    rows = [random_tokens(1, n + 6, seed=n) for n in lengths]
    with torch.no_grad():
        alone = [model(row) for row in rows]
        cache = KVCache(model.config, 3)
        tokens, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.bool)
        for i, n in enumerate(lengths):
            tokens[i, 9 - n :], mask[i, 9 - n :] = rows[i][0, :n], True
        got = [[] for _ in rows]
        first = model(tokens, mask_BT=mask, cache=cache, logits="last")
        for i in range(3):
            got[i].append(first.logits_BTV[i, 0])
        sent = list(lengths)
        for step in range(9):  # row i rests whenever (step + i) % 3 == 0
            awake = torch.tensor([(step + i) % 3 != 0 for i in range(3)])[:, None]
            column = torch.tensor(
                [[rows[i][0, min(sent[i], lengths[i] + 5)].item()] for i in range(3)]
            )
            out = model(column, mask_BT=awake, cache=cache)
            for i in range(3):
                if awake[i]:
                    got[i].append(out.logits_BTV[i, 0])
                    sent[i] += 1
    for i, n in enumerate(lengths):
        assert sent[i] == n + 6
        expected = alone[i].logits_BTV[0, n - 1 :]
        assert (torch.stack(got[i]) - expected).abs().max() < 1e-4
    assert cache.length.tolist() == sent


@pytest.mark.parametrize("make", cases("pairs", with_final=True))
def test_gradients_with_padding_equal_those_without(make):
    model = make()
    row = random_tokens(1, 6)
    padded = torch.cat([random_tokens(1, 3, seed=5), row], 1)
    mask = torch.tensor([[False] * 3 + [True] * 6])
    other, other_mask = random_tokens(1, 9, seed=6), torch.ones(1, 9, dtype=torch.bool)

    def gradients(tokens, mask_BT, pick):
        model.zero_grad()
        (model(tokens, mask_BT=mask_BT).logits_BTV[pick].square().sum()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    alone = gradients(row, None, (0, slice(None)))
    both = gradients(torch.cat([padded, other]), torch.cat([mask, other_mask]), (0, slice(3, None)))
    for name, gradient in alone.items():
        assert (gradient - both[name]).abs().max() <= 1e-4 * max(1.0, gradient.abs().max()), name
    assert all(g.isfinite().all() for g in both.values())
