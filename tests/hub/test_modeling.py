"""transformers, PEFT and Trainer: a MoR model behaves there like any other causal language
model."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from mor import checkpoint
from mor.data.tokenizer import byte_tokenizer
from mor.generation import SamplingParams, generate
from mor.hub.modeling import MoRCache, MoRForCausalLM
from mor.model.config import ModelConfig, RouterConfig
from tests.conftest import cases, random_tokens, tiny
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


@pytest.mark.parametrize("make", cases("pairs"))
def test_greedy_generate_equals_our_decoder(make):
    ours = make()
    theirs = wrapped(ours)
    prompts = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3, 5, 8, 9]]
    expected = generate(ours, prompts, SamplingParams(max_new_tokens=9, temperature=0))
    ids = torch.tensor([[0] * (7 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (7 - len(p)) + [1] * len(p) for p in prompts])
    for use_cache in (True, False):
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
    cached = theirs.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
    ).past_key_values
    assert [[d for d in row if d] for row in cached.depth_BT.tolist()] == [
        e.depths for e in expected
    ]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(
    "settings",
    [
        dict(do_sample=True, temperature=0.8, top_k=9),
        dict(num_beams=3),
        dict(num_beams=3, do_sample=True),
    ],
    ids=["sampling", "beams", "beam-sampling"],
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
        torch.testing.assert_close(found.loss, nll + expected.routing.weighted_loss)
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


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("router", [pytest.param("fixed", marks=pytest.mark.slow), "expert_choice"])
def test_a_compiled_forward_gives_the_same_values(backend, router):
    torch._dynamo.reset()
    model = wrapped(tiny(router, num_recursions=2, num_layers=4)).train()  # compiles sooner
    tokens, mask, labels = batch_and_labels()
    compiled = torch.compile(model, backend=backend)
    for given in (None, mask):
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


def test_max_depth_and_selection_are_arguments():
    model, tokens = wrapped(), random_tokens(2, 9)
    assert model(tokens, max_depth=1).depths.max() == 1
    expected = model.model(tokens, selection="topk").routing.depth_BT
    assert torch.equal(model(tokens, selection="topk").depths, expected)
    assert not torch.equal(expected, model(tokens).depths)
    assert len(model(tokens, return_dict=False)) == 2


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
