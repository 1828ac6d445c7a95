"""transformers, PEFT and Trainer: a MoR model behaves there like any other causal language
model."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from mor import checkpoint
from mor.data.tokenizer import byte_tokenizer
from mor.generation import SamplingParams, generate
from mor.hub.configuration import MoRConfig
from mor.hub.modeling import _CACHE, MoRCache, MoRForCausalLM
from mor.model.budget import even_table
from mor.model.config import ModelConfig, RouterConfig
from tests.conftest import cases, random_tokens, some, tiny
from tests.hub.wrapped import wrapped

ROUTERS = ["fixed", "expert_choice", "token_choice", "random", "position", "frequency"]


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_are_bit_exact_in_both_directions(tied, tmp_path):
    router = RouterConfig(
        kind="expert_choice", capacities=(1, 0.7, 0.2), causal_selection="aux_router", alpha=0.3
    )
    model = wrapped(tiny(router, tie_embeddings=tied, vocab_size=257))
    model.model.router.threshold_R.copy_(torch.tensor([0.5, 0.4, 0.6]))
    model.save_pretrained(tmp_path / "theirs")
    byte_tokenizer().save(tmp_path / "theirs")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    ours = checkpoint.load(tmp_path / "theirs")
    assert (
        type(again) is MoRForCausalLM
        and again.config.to_model_config() == ours.config == model.model.config
    )
    checkpoint.save(tmp_path / "ours", ours.model, ours.tokenizer)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for other in (again.model, ours.model, final.model):
        assert other.state_dict().keys() == model.model.state_dict().keys()
        for name, tensor in model.model.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name
    assert final.generation_config.eos_token_id == ours.tokenizer.end_of_text_id
    tokens = random_tokens(2, 11)
    assert torch.equal(final(tokens).logits, model.model(tokens).logits_BTV)


def rewrite(folder, change):
    """Change the tensors of a folder. change: of the dictionary of tensors."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without(name):
    return lambda state: {n: t for n, t in state.items() if not n.endswith(name)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("shared_blocks.0.attention.q_proj.weight"), r"; missing: \S*q_proj\.weight$"),
        (
            lambda s: s | {"model.head.weight": torch.zeros(37, 24)},
            r"; left over: \S*head\.weight$",
        ),
        (lambda s: {f"module.{n}": t for n, t in s.items()}, r"missing: .*; left over: module\."),
        (
            lambda s: s | {"model.final_norm.weight": torch.full((24,), torch.nan)},
            r"; not finite \(nan or infinity\): model\.final_norm\.weight$",
        ),
    ],
)
def test_every_tensor_is_accounted_for_by_transformers_too(change, words, tmp_path):
    wrapped().save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_transformers_compares_a_folder_with_its_checksums(tmp_path):
    checkpoint.save(tmp_path / "c", tiny(vocab_size=257), byte_tokenizer())
    AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    rewrite(
        tmp_path / "c",
        lambda s: s | {"model.final_norm.weight": 2 * s["model.final_norm.weight"]},
    )
    for folder, settings in ((tmp_path / "c", {}), (tmp_path, {"subfolder": "c"})):
        with pytest.raises(ValueError, match=r"c/model\.safetensors is damaged: its checksum"):
            MoRForCausalLM.from_pretrained(folder, **settings)


def test_what_loading_tells_is_still_told(tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()) and again.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=41)
    other, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, vocab_size=41, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert [name for name, *_ in info["mismatched_keys"]] == ["model.embedding.weight"]
    assert torch.equal(other.model.final_norm.weight, model.model.final_norm.weight)


def test_no_tensor_is_stored_twice(tmp_path):
    from safetensors import safe_open

    model = wrapped(num_recursions=3)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    assert sum(stored.values()) == sum(t.numel() for t in model.model.state_dict().values())
    assert not any("head" in name for name in stored)


def test_lower_precision_loads_exactly(tmp_path):
    model = wrapped(vocab_size=257).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save(tmp_path)
    loaded = checkpoint.load(tmp_path).model
    assert loaded.embedding.weight.dtype == torch.float32
    assert torch.equal(loaded.embedding.weight.to(torch.bfloat16), model.model.embedding.weight)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_unknown_keys_of_our_own_files_stay_errors(tmp_path):
    checkpoint.save(tmp_path / "c", tiny(vocab_size=257), byte_tokenizer())
    values = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps(values | {"num_recursion": 2}))
    (tmp_path / "c" / "checksums.json").unlink()
    with pytest.raises(ValueError, match="did you mean 'num_recursions'"):
        checkpoint.load(tmp_path / "c")


def test_importing_mor_loads_neither_torch_nor_transformers():
    code = "import sys, mor; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "[]"
    )


# generate()


@pytest.mark.parametrize("make", some(cases("singles"), 2))
def test_greedy_generate_equals_our_decoder(make):
    ours = make()
    theirs = wrapped(ours)
    prompts = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3, 5, 8, 9]]
    expected = generate(ours, prompts, SamplingParams(max_new_tokens=9, temperature=0))
    ids = torch.tensor([[0] * (7 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (7 - len(p)) + [1] * len(p) for p in prompts])
    for use_cache in (False, True):
        made = theirs.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=9,
            do_sample=False,
            use_cache=use_cache,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        assert made.sequences[:, 7:].tolist() == [e.token_ids for e in expected]
    cached = made.past_key_values
    depths = [row[real].tolist() for row, real in zip(cached.depth_BT, cached.mask_BT, strict=True)]
    assert depths == [e.depths for e in expected]


SEARCHES = {
    "sampling": dict(do_sample=True, temperature=0.8, top_k=9),
    "beams": dict(num_beams=3),
    "beam-sampling": dict(num_beams=3, do_sample=True),
}


@pytest.mark.parametrize(
    ("router", "settings"),
    [
        pytest.param(
            router, SEARCHES[name], id=f"{name}-{router}", marks=() if quick else pytest.mark.slow
        )
        for i, router in enumerate(ROUTERS)
        for j, name in enumerate(SEARCHES)
        for quick in [router == "expert_choice" or i % 3 == j]
    ],
)
def test_sampling_and_beams_do_not_depend_on_cache_padding_or_batch(router, settings):
    model = wrapped(tiny(router))
    prompts = [[3, 1, 4, 1, 5], [6, 5]]

    def texts(rows, **more):
        width = max(map(len, rows)) + 2
        ids = torch.tensor([[0] * (width - len(p)) + p for p in rows])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in rows])
        torch.manual_seed(0)
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=8, eos_token_id=None, **settings, **more
        )
        return made[:, width:].tolist()

    both = texts(prompts)
    assert both == texts(prompts, use_cache=False)
    assert texts(prompts[:1]) == texts(prompts[:1], use_cache=False)
    if not settings.get("do_sample"):  # draws of a batch come from one generator
        assert both == [texts([p])[0] for p in prompts]
    torch.manual_seed(0)
    unpadded = model.generate(
        torch.tensor(prompts[:1]), max_new_tokens=8, eos_token_id=None, **settings
    )
    assert unpadded[:, 5:].tolist() == texts(prompts[:1])


@pytest.mark.parametrize("router", ROUTERS)
def test_speculation_from_the_prompt_gives_the_same_text(router):
    model = wrapped(tiny(router))
    prompt = torch.tensor([[3, 1, 4, 1, 5, 9, 3, 1, 4, 1, 5, 9, 3, 1]])
    plain = model.generate(prompt, max_new_tokens=15, do_sample=False, eos_token_id=None)
    fast = model.generate(
        prompt, max_new_tokens=15, do_sample=False, eos_token_id=None, prompt_lookup_num_tokens=4
    )
    assert plain.tolist() == fast.tolist()


def test_a_conversation_goes_on_from_its_cache():
    model, tokens = wrapped(), random_tokens(2, 12)
    first = model(tokens[:, :5], use_cache=True)
    second = model(tokens[:, 5:], cache=first.cache, logits_to_keep=1)
    whole = model(tokens)
    torch.testing.assert_close(second.logits[:, 0], whole.logits[:, -1], atol=1e-5, rtol=1e-5)
    assert torch.equal(second.cache.depth_BT, whole.depths)
    assert torch.equal(second.cache.depth_BT[:, 5:], second.depths)


def test_cache_rows_can_be_repeated_and_dropped():
    model, tokens = wrapped(), random_tokens(2, 9)
    cache = model(tokens[:, :6], use_cache=True).cache
    cache.batch_repeat_interleave(2)
    cache.crop(-2)
    assert cache.batch_size == 4 and cache.get_seq_length() == 4
    repeated = tokens.repeat_interleave(2, 0)
    again = model(repeated[:, 4:], cache=cache)
    torch.testing.assert_close(again.logits, model(repeated).logits[:, 4:], atol=1e-5, rtol=1e-5)
    cache.reset()
    assert cache.get_seq_length() == 0 and torch.equal(
        model(tokens, past_key_values=cache).depths, model(tokens).depths
    )


FROM_0 = RouterConfig(kind="random", capacities=(0.5, 0.3, 0.1))
GREEDY = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
PROMPTS = [[3, 1, 4, 1, 5], [6, 5]]
PADDED = {  # the same prompts: (ids, attention mask)
    "left": ([[3, 1, 4, 1, 5], [0, 0, 0, 6, 5]], [[1] * 5, [0, 0, 0, 1, 1]]),
    "right": ([[3, 1, 4, 1, 5], [6, 5, 0, 0, 0]], [[1] * 5, [1, 1, 0, 0, 0]]),
    "holes": ([[3, 1, 4, 1, 5], [6, 0, 0, 5, 0]], [[1] * 5, [1, 0, 0, 1, 0]]),
}


def greedy_of(model, prompts=PROMPTS):
    params = SamplingParams(max_new_tokens=8, temperature=0)
    return [result.token_ids for result in generate(model.model, prompts, params)]


@pytest.mark.parametrize("router", ["expert_choice", FROM_0], ids=["from-1", "from-0"])
@pytest.mark.parametrize("padding", PADDED)
def test_padding_on_either_side_and_in_between_changes_no_text(padding, router):
    model, (ids, mask) = wrapped(tiny(router)), map(torch.tensor, PADDED[padding])
    for attention_mask in (mask, mask.float()):
        made = model.generate(ids, attention_mask=attention_mask, **GREEDY)
        assert made[:, 5:].tolist() == greedy_of(model)
    if padding == "left":
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        made = model.generate(ids, attention_mask=mask, position_ids=positions, **GREEDY)
        assert made[:, 5:].tolist() == greedy_of(model)


@pytest.mark.parametrize(
    "settings",
    [dict(prompt_lookup_num_tokens=3), dict(assistant_model=True)],
    ids=["lookup", "model"],
)
def test_speculation_is_exact_where_tokens_take_no_recursion(settings):
    model = wrapped(tiny(FROM_0))
    if "assistant_model" in settings:
        settings = dict(assistant_model=wrapped(tiny(FROM_0, num_layers=5)))
    prompt = [3, 1, 4, 1, 5, 9, 3, 1, 4, 1, 5]
    made = model.generate(torch.tensor([prompt]), **GREEDY, **settings)
    assert made[0, len(prompt) :].tolist() == greedy_of(model, [prompt])[0]


def test_beams_and_copies_of_the_cache_where_tokens_take_no_recursion():
    model, tokens = wrapped(tiny(FROM_0)), random_tokens(2, 9)
    beams = [
        model.generate(tokens, num_beams=3, num_return_sequences=2, use_cache=on, **GREEDY).tolist()
        for on in (True, False)
    ]
    assert beams[0] == beams[1] and len(beams[0]) == 4
    cache = model(tokens[:, :6], use_cache=True).cache
    assert (cache.depth_BT == 0).any()
    cache.crop(-1)
    assert cache.get_seq_length() == 5 and cache.kv.length.tolist() == [5, 5]
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        found = model(tokens[:, 5:], cache=other)
        torch.testing.assert_close(found.logits, model(tokens).logits[:, 5:], atol=1e-5, rtol=1e-5)
        assert torch.equal(other.depth_BT, model(tokens).depths)
        assert cache.get_seq_length() == 5


def test_text_goes_on_from_a_copy_of_a_read_beginning():
    model, prompt = wrapped(), torch.tensor([PROMPTS[0]])
    cache = model(prompt[:, :3], use_cache=True).cache
    for _ in range(2):
        made = model.generate(prompt, **{_CACHE: copy.deepcopy(cache)}, **GREEDY)
        assert made[0, 5:].tolist() == greedy_of(model)[0]


def test_stop_strings_end_the_text():
    tokenizer = byte_tokenizer().to_transformers()
    model = wrapped(tiny("expert_choice", vocab_size=257))
    prompt = torch.tensor([[70, 71, 72]])
    printable = GREEDY | dict(suppress_tokens=list(range(94, 257)))  # no parts of characters
    text = tokenizer.decode(model.generate(prompt, **printable)[0, 3:])
    stop = text[2:4]
    made = model.generate(prompt, stop_strings=[stop], tokenizer=tokenizer, **printable)
    assert tokenizer.decode(made[0, 3:]) == text[: text.index(stop) + len(stop)]


def test_positions_are_those_the_model_counts_or_refused():
    model, tokens = wrapped(), random_tokens(2, 7)
    expected = model(tokens).logits
    counted = torch.arange(7)[None]
    assert torch.equal(model(tokens, position_ids=counted).logits, expected)
    cache = model(tokens[:, :4], use_cache=True).cache
    later = model(tokens[:, 4:], cache=cache, position_ids=counted[:, 4:].expand(2, 3))
    torch.testing.assert_close(later.logits, expected[:, 4:], atol=1e-5, rtol=1e-5)
    for wrong in (counted + 3, counted.flip(1), counted.clamp(max=5)):
        with pytest.raises(ValueError, match="position_ids differ"):
            model(tokens, position_ids=wrong)
    with pytest.raises(ValueError, match="position_ids differ"):
        model(tokens[:, 4:], cache=copy.deepcopy(cache), position_ids=counted[:, :3])
    with pytest.raises(ValueError, match="position_ids have shape"):
        model(tokens, position_ids=counted[0])


def test_positions_that_start_again_separate_packed_documents():
    model = wrapped(kv_strategy="hybrid")
    first, second = random_tokens(1, 5), random_tokens(1, 4, seed=1)
    packed, positions = torch.cat([first, second], 1), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    found = model(packed, position_ids=positions, logits_to_keep=4)
    torch.testing.assert_close(found.logits, model(second).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.depths[:, 5:], model(second).depths)
    last = model(packed, position_ids=positions, logits_to_keep=1).logits
    torch.testing.assert_close(last, found.logits[:, -1:])


@pytest.mark.parametrize(
    "settings",
    [
        dict(do_sample=False),
        dict(do_sample=True),
        dict(do_sample=False, num_beams=3),
        dict(do_sample=False, prompt_lookup_num_tokens=2),
        dict(do_sample=False, min_new_tokens=2, eos_token_id=1),
    ],
    ids=["greedy", "sampling", "beams", "lookup", "with a banned token"],
)
def test_logits_that_are_not_finite_end_generate(settings):
    prompt = torch.tensor([[3, 1, 4, 3, 1]])
    assert wrapped().generate(prompt, max_new_tokens=3, **settings).shape[1] > 5
    model = wrapped()
    with torch.no_grad():
        model.model.final_norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.generate(prompt, max_new_tokens=3, **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_text_in_another_precision_is_ours_in_that_precision(dtype):
    model, (ids, mask) = wrapped().to(dtype), map(torch.tensor, PADDED["left"])
    made = model.generate(ids, attention_mask=mask, **GREEDY)
    assert made[:, 5:].tolist() == greedy_of(model)


def test_text_under_autocast():
    model = wrapped()
    with torch.autocast("cpu", torch.bfloat16):
        made = model.generate(torch.tensor(PROMPTS[:1]), **GREEDY)
        assert made[:, 5:].tolist() == greedy_of(model, PROMPTS[:1])


# Training


def batch_and_labels(padding=True):
    tokens = random_tokens(3, 14)
    mask = torch.ones_like(tokens)
    if padding:
        mask[1, 9:] = mask[2, :4] = 0
    return tokens, mask, tokens.masked_fill(mask == 0, -100)


@pytest.mark.parametrize("router", ROUTERS)
def test_the_loss_is_ours_with_auxiliary_losses_and_topk_only_in_training_steps(router):
    model = wrapped(tiny(router))
    tokens, mask, labels = batch_and_labels()
    for training in (True, False):
        model.train(training)
        found = model(tokens, attention_mask=mask, labels=labels)
        expected = model.model(
            tokens, mask_BT=mask.bool(), selection="topk" if training else "threshold"
        )
        nll = F.cross_entropy(expected.logits_BTV[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        aux_loss = expected.routing.weighted_loss if training else 0
        torch.testing.assert_close(found.loss, nll + aux_loss)
        torch.testing.assert_close(found.aux_loss, expected.routing.weighted_loss)
        assert torch.equal(found.depths, expected.routing.depth_BT)
    model.train()
    assert torch.equal(
        model(tokens).depths, model.model(tokens, selection="threshold").routing.depth_BT
    )


def test_losses_of_accumulated_batches_add_up_to_their_mean():
    model = wrapped().train()
    tokens, mask, labels = batch_and_labels()
    items = (labels[:, 1:] != -100).sum()
    parts = [
        model(
            tokens[i : i + 1],
            attention_mask=mask[i : i + 1],
            labels=labels[i : i + 1],
            num_items_in_batch=items,
        )
        for i in range(3)
    ]
    alone = [
        model(tokens[i : i + 1], attention_mask=mask[i : i + 1], labels=labels[i : i + 1])
        for i in range(3)
    ]
    share = [(labels[i, 1:] != -100).sum() / items for i in range(3)]
    torch.testing.assert_close(
        sum(p.loss for p in parts), sum(s * a.loss for s, a in zip(share, alone, strict=True))
    )


def test_gradient_checkpointing_keeps_the_gradients_and_fewer_activations():
    tokens, mask, labels = batch_and_labels()
    found, kept = [], []
    for on in (False, True):
        model = wrapped().train()
        if on:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        seen = {}

        def keep(t, seen=seen):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model(tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        kept.append(sum(seen.values()))
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], atol=1e-6, rtol=1e-5, msg=name)
    assert kept[1] < kept[0] * 0.6


def test_lora_on_the_shared_blocks(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = wrapped(num_recursions=3)
    tokens, mask, labels = batch_and_labels()
    before = base(tokens, attention_mask=mask).logits.detach()
    where = r".*shared_blocks.*\.(q_proj|v_proj|up_proj)"
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=where, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(base, lora)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 * 2 and all("shared_blocks" in n and "lora" in n for n in trained)
    torch.testing.assert_close(model(tokens, attention_mask=mask).logits, before)

    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model.train()(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    model.eval()
    tuned = model(tokens, attention_mask=mask).logits.detach()
    assert (tuned - before).abs().max() > 1e-2
    with model.disable_adapter():
        torch.testing.assert_close(model(tokens, attention_mask=mask).logits, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(wrapped(num_recursions=3), tmp_path).eval()
    torch.testing.assert_close(loaded(tokens, attention_mask=mask).logits, tuned)
    text = model.generate(tokens[:1], max_new_tokens=6, do_sample=False, eos_token_id=None).tolist()
    merged = model.merge_and_unload()
    torch.testing.assert_close(
        merged(tokens, attention_mask=mask).logits, tuned, atol=1e-4, rtol=1e-4
    )
    assert (
        merged.generate(tokens[:1], max_new_tokens=6, do_sample=False, eos_token_id=None).tolist()
        == text
    )


@pytest.mark.slow
@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("router", ["fixed", "expert_choice"])
def test_a_compiled_forward_gives_the_same_values(backend, router, padding):
    torch._dynamo.reset()
    few = dict(num_recursions=2, num_layers=2, sharing="cycle")  # compiles sooner
    model = wrapped(tiny(router, **few)).train()
    tokens, mask, labels = batch_and_labels()
    compiled = torch.compile(model, backend=backend)
    given = mask if padding else None
    plain = model(tokens, attention_mask=given, labels=labels)
    fast = compiled(tokens, attention_mask=given, labels=labels)
    torch.testing.assert_close(fast.logits, plain.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fast.loss, plain.loss, atol=1e-5, rtol=1e-5)
    assert torch.equal(fast.depths, plain.depths)
    gradients = []
    for output in (plain, fast):
        model.zero_grad()
        output.loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# The rest of the interface


def test_resized_embeddings():
    model, tokens = wrapped(), random_tokens(2, 7)
    before = model(tokens).logits
    model.resize_token_embeddings(40)
    assert model.config.vocab_size == model.model.config.vocab_size == 40
    torch.testing.assert_close(model(tokens).logits[..., :37], before)
    assert isinstance(model.model.config, ModelConfig)


def test_tokens_added_to_the_vocabulary_are_the_rarest():
    model = wrapped(tiny("frequency"))
    model.model.router.fit(torch.arange(1, 38))
    model.resize_token_embeddings(40, mean_resizing=False)
    new = torch.tensor([[38, 39, 38]])
    assert (model(new).depths == 3).all() and model(random_tokens(2, 9)).depths.min() == 1
    model.resize_token_embeddings(30, mean_resizing=False)
    assert len(model.model.router.need_V) == 30


def test_max_depth_and_selection_are_arguments():
    model, tokens = wrapped(), random_tokens(2, 9)
    assert model(tokens, max_depth=1).depths.max() == 1
    expected = model.model(tokens, selection="topk").routing.depth_BT
    assert torch.equal(model(tokens, selection="topk").depths, expected)
    assert not torch.equal(expected, model(tokens).depths)
    assert len(model(tokens, return_dict=False)) == 2


def test_copies_pickles_and_saved_modules_are_the_same_model(tmp_path):
    model, tokens = wrapped(), random_tokens(2, 9)
    torch.save(model, tmp_path / "model.pt")
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        pickle.loads(pickle.dumps(torch.nn.DataParallel(model))).module,
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert torch.equal(other(tokens).logits, model(tokens).logits)
        assert other.config.to_model_config() == model.model.config


@pytest.mark.parametrize("tied", [True, False])
def test_weights_in_several_files(tied, tmp_path):
    model, tokens = wrapped(tie_embeddings=tied), random_tokens(2, 9)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def deepened_and_trained():
    """With numbers in place of the zeros that training would fill."""
    base = wrapped(tiny("gain", num_recursions=3, deepened=True, lora_rank=2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if ".lora_" in name or ".deepening." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return base


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "down_proj"]])
def test_lora_around_layers_that_have_adapters_of_their_own(target):
    from peft import LoraConfig, get_peft_model

    base, tokens = deepened_and_trained(), random_tokens(2, 9)
    before = base(tokens).logits.detach()
    lora = LoraConfig(r=2, target_modules=target, init_lora_weights=False)
    model = get_peft_model(base, lora).eval()
    tuned = model(tokens).logits.detach()
    assert (tuned - before).abs().max() > 0.01
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, tuned, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["dora", "ia3"])
def test_what_would_scale_adapters_of_the_models_own_is_refused(how):
    from peft import IA3Config, LoraConfig, get_peft_model

    tokens = random_tokens(2, 9)
    inside = {
        "dora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        "ia3": IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    }[how]
    with pytest.raises(ValueError, match=r"more than a sum.*Take LoRA without DoRA"):
        get_peft_model(deepened_and_trained(), inside)(tokens)
    get_peft_model(wrapped(num_recursions=3), inside)(tokens)  # without adapters of its own


@pytest.mark.parametrize("how", ["target_modules", "modules_to_save", "trainable_tokens"])
def test_an_adapter_on_tied_embeddings_acts_on_the_head_before_merging_as_after(how):
    from peft import LoraConfig, get_peft_model

    settings = {
        "target_modules": dict(target_modules=["embedding"], init_lora_weights=False),
        "modules_to_save": dict(target_modules=["q_proj"], modules_to_save=["embedding"]),
        "trainable_tokens": dict(
            target_modules=["q_proj"], trainable_token_indices={"embedding": [3, 5]}
        ),
    }[how]
    base, tokens = wrapped(), random_tokens(2, 9)
    assert base.config.tie_word_embeddings and base.config.to_dict()["tie_word_embeddings"]
    before = base(tokens).logits.detach()
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    tuned = model.eval()(tokens).logits.detach()
    assert (tuned - before).abs().max() > 0.1
    merged = model.merge_and_unload()
    assert type(merged.model.embedding) is torch.nn.Embedding
    torch.testing.assert_close(merged(tokens).logits, tuned, atol=1e-4, rtol=1e-4)


def test_one_setting_by_two_names_has_one_value(tmp_path):
    with pytest.raises(ValueError, match="tie_embeddings"):
        MoRConfig(tie_embeddings=True, tie_word_embeddings=False)
    config = MoRConfig(hidden_size=32, dim=32)
    assert MoRConfig.from_dict(config.to_dict()).to_model_config() == config.to_model_config()
    wrapped().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["tie_embeddings"] is values["tie_word_embeddings"] is True
    changed = AutoConfig.from_pretrained(tmp_path, tie_word_embeddings=False)
    assert changed.to_model_config().tie_embeddings is False


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(attention_mask=torch.ones(2, 4)), r"need \(2, 9\)"),
        (dict(attention_mask=torch.ones(2, 1, 9, 9)), r"need \(2, 9\)"),
        (dict(attention_mask=torch.full((2, 9), 2)), "a mask is true"),
        (dict(attention_mask=torch.zeros(2, 9) - 1e9), "a mask is true"),
        (
            dict(attention_mask=torch.tensor([[1] * 9, [0] * 9]), logits_to_keep=1),
            "row 1 of the batch has no token",
        ),
        (dict(labels=torch.full((2, 9), -1)), r"labels must lie in 0\.\.36, or be -100"),
        (dict(labels=torch.full((2, 9), 37)), r"labels must lie in 0\.\.36, or be -100"),
        (dict(labels=torch.ones(2, 8).long()), r"labels have shape \(2, 8\)"),
        (dict(logits_to_keep=-1), "logits_to_keep counts columns"),
        (dict(max_depth=0), r"1\.\.3, got 0"),
        (dict(past_key_values=((1, 2),)), "must be a MoRCache, as forward returns it, not a tuple"),
        (dict(output_attentions=True), "output_attentions is not supported"),
        (dict(attention_mask=[[1] * 9] * 2), "attention_mask must be a tensor, got a list"),
        (dict(labels=[[1] * 9] * 2), "labels must be a tensor, got a list"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        wrapped()(random_tokens(2, 9), **settings)


def test_a_cache_keeps_to_its_model_its_batch_and_what_it_has_read():
    model, tokens = wrapped(), random_tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    cache = model(tokens[:, :6], attention_mask=mask[:, :6], use_cache=True).cache
    whole = model(tokens, attention_mask=mask).logits[:, 6:]
    for given in (mask, mask[:, 6:], None):
        later = model(tokens[:, 6:], attention_mask=given, cache=copy.deepcopy(cache)).logits
        torch.testing.assert_close(later, whole, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="hides other tokens"):
        model(tokens[:, 6:], attention_mask=torch.ones(2, 9), cache=cache)
    with pytest.raises(ValueError, match="holds 2 sequences, the batch has 1"):
        model(tokens[:1, 6:], cache=cache)
    with pytest.raises(ValueError, match="other settings"):
        wrapped(num_layers=5)(tokens[:, 6:], cache=cache)
    with pytest.raises(ValueError, match="holds 6 columns, 7 cannot"):
        cache.crop(-7)
    empty = MoRCache()
    for change in (
        lambda: empty.crop(0),
        lambda: empty.reorder_cache(torch.tensor([0])),
        lambda: empty.batch_repeat_interleave(2),
    ):
        change()
        assert empty.get_seq_length() == 0


def test_columns_of_logits_are_chosen_by_number_or_by_place():
    model, tokens = wrapped(), random_tokens(2, 9)
    whole = model(tokens).logits
    assert torch.equal(model(tokens, logits_to_keep=3).logits, whole[:, -3:])
    places = torch.tensor([0, 4])
    assert torch.equal(model(tokens, logits_to_keep=places).logits, whole[:, places])


def test_what_is_not_supported_says_so():
    from transformers import DynamicCache

    model, tokens = wrapped(), random_tokens(2, 9)
    with pytest.raises(ValueError, match="inputs_embeds is not supported"):
        model(inputs_embeds=torch.zeros(2, 9, 24))
    with pytest.raises(ValueError, match="output_hidden_states is not supported"):
        model(tokens, output_hidden_states=True)
    with pytest.raises(ValueError, match="must be a MoRCache"):
        model(tokens, cache=DynamicCache())
    with pytest.raises(ValueError, match="minus the number"):
        model(tokens, cache=MoRCache()).cache.crop(3)
    assert AutoConfig.for_model("mor", dim=32).dim == 32


@torch.no_grad()
def test_generate_takes_a_depth_from_its_settings():
    """As an argument, from the GenerationConfig or the model; prompts padded, with a cache: as ours
    does it."""
    from tests.budgets import calibrated

    model, prompts = calibrated("expert", "hybrid"), random_tokens(3, 7)
    own = MoRForCausalLM.from_transformer(model).eval()
    settings = dict(
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    mask = dict(attention_mask=torch.ones_like(prompts))
    for depth in (1.6, "full", 4.3):
        params = SamplingParams(max_new_tokens=6, temperature=0, depth=depth)
        want = generate(model, prompts.tolist(), params)
        given = own.generate(prompts, depth=depth, **mask, **settings)
        configured = own.generate(prompts, GenerationConfig(depth=depth, **settings), **mask)
        own.depth = depth
        by_model = own.generate(prompts, **mask, **settings)
        own.depth = None
        for made in (given, configured, by_model):
            assert made.sequences[:, 7:].tolist() == [g.token_ids for g in want]
            assert made.past_key_values.depth_BT.tolist() == [g.depths for g in want]
    assert {1, 2, 5} <= {d for g in want for d in g.depths}
    with pytest.raises(ValueError, match="neither max_depth"):
        own(prompts, depth=2.0, max_depth=2)


@pytest.mark.parametrize(
    "router", ["gain", RouterConfig(kind="expert_choice", causal_selection="gain")]
)
def test_routers_that_predict_gains_say_that_they_learn_none_here(router):
    model, tokens = wrapped(tiny(router)).train(), random_tokens(2, 7)
    with pytest.warns(UserWarning, match="predicts gains learns nothing here"):
        model(tokens, labels=tokens)


def test_the_table_of_depths_and_the_depth_are_saved_and_training_forgets_them(tmp_path):
    model = MoRForCausalLM.from_transformer(tiny("expert_choice"))
    table = even_table(model.model.config, 4)
    model.model.depth_table = table
    model.generation_config.depth = 1.5
    model.save_pretrained(tmp_path / "a")
    found = MoRForCausalLM.from_pretrained(tmp_path / "a")
    assert found.model.depth_table == table and found.generation_config.depth == 1.5
    ids = random_tokens(1, 8)
    found.train()(ids, labels=ids)
    assert found.model.depth_table is None, "its weights are about to change"
    found.save_pretrained(tmp_path / "b")
    assert MoRForCausalLM.from_pretrained(tmp_path / "b").model.depth_table is None
