"""Llama models in and out: the same logits, the same weights."""

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, MistralForCausalLM, Qwen2Config

from mor.conversion.initialise import recursive_init
from mor.conversion.llama import from_llama, llama_config, to_llama
from mor.generation import SamplingParams, generate
from mor.model.config import RouterConfig, layout
from tests.small_llama import SIZES, close, initialised, llama, tokens


@pytest.mark.parametrize("tied", [True, False])
@torch.inference_mode()
def test_logits_are_the_same_both_ways_and_weights_return_bit_for_bit(tied):
    theirs = llama(tie_word_embeddings=tied)
    ours = from_llama(theirs)
    ids = tokens(3, 50)
    expected = theirs(ids).logits
    assert expected.std() > 0.1, "logits must be far from constant for this test to mean something"
    close(ours(ids).logits_BTV, expected)
    again = to_llama(ours)
    close(again(ids).logits, expected)
    state, before = again.state_dict(), theirs.state_dict()
    assert state.keys() == before.keys() and all(
        torch.equal(state[name], before[name]) for name in before
    )
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    for name in SIZES.keys() - {"bos_token_id", "eos_token_id", "pad_token_id"}:
        assert getattr(again.config, name) == getattr(theirs.config, name), name


def test_greedy_text_is_the_same():
    theirs = llama()
    prompt = tokens(1, 9)
    expected = theirs.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=None)[
        0, 9:
    ].tolist()
    params = SamplingParams(max_new_tokens=40, temperature=0)
    assert generate(from_llama(theirs), [prompt[0].tolist()], params)[0].token_ids == expected


def test_mistral_without_a_window_is_a_llama():
    theirs = llama(kind=(MistralConfig, MistralForCausalLM), sliding_window=None)
    ids = tokens(2, 30)
    with torch.inference_mode():
        close(from_llama(theirs)(ids).logits_BTV, theirs(ids).logits)


def test_a_recursive_model_unrolls_into_a_llama_of_the_same_function():
    for sharing in ("middle_cycle", "sequence"):
        ours = initialised(from_llama(llama()), 2, sharing, "lower")
        ids = tokens(2, 30)
        with torch.inference_mode():
            close(to_llama(ours)(ids).logits, ours(ids).logits_BTV)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Qwen2Config(), "model_type='qwen2'"),
        (LlamaConfig(attention_bias=True), "attention_bias=True"),
        (LlamaConfig(mlp_bias=True), "mlp_bias=True"),
        (LlamaConfig(hidden_act="gelu"), "hidden_act='gelu'"),
        (
            LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            "rope_parameters=",
        ),
        (
            LlamaConfig(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            "rope_parameters=",
        ),
        (MistralConfig(sliding_window=4096), "sliding_window=4096"),
        (LlamaConfig(quantization_config={"quant_method": "gptq"}), "quantized"),
    ],
)
def test_settings_that_mor_does_not_have_are_named(config, words):
    with pytest.raises(ValueError, match=words):
        llama_config(config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(router=RouterConfig(kind="expert_choice")), "a MoR model"),
        (dict(kv_strategy="shared"), "kv_strategy='shared'"),
    ],
)
def test_models_that_llama_cannot_express_are_refused(settings, words):
    ours = from_llama(llama())
    config = ours.config.replace(**layout(8, 2), **settings)
    with pytest.raises(ValueError, match=words):
        to_llama(recursive_init(ours, config))
