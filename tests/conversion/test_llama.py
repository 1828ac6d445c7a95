"""Llama models in and out: the same logits, the same weights."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
)

from mor import checkpoint
from mor.conversion.convert import convert, read_source
from mor.conversion.initialise import recursive_init
from mor.conversion.llama import from_llama, llama_config, to_llama
from mor.data.tokenizer import Tokenizer
from mor.generation import SamplingParams, generate
from mor.model.config import RouterConfig, layout
from tests.small_llama import SIZES, chat_tokenizer, close, initialised, llama, save_llama, tokens


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "source")


@pytest.fixture
def source(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "llama"))


def rewrite(source, change=None, **settings):
    """Change the tensors and the config of a directory. change: of the dictionary of tensors."""
    values = json.loads((source / "config.json").read_text()) | settings
    (source / "config.json").write_text(json.dumps(values))
    state = load_file(source / "model.safetensors")
    save_file((change or dict)(state), source / "model.safetensors", metadata={"format": "pt"})


def without(name):
    return lambda state: {n: t for n, t in state.items() if not n.endswith(name)}


def adding(name, *shape):
    return lambda state: state | {name: torch.ones(*shape)}


LAYER = "model.layers.0.self_attn."
ANGLES = 1 / 777.0 ** (torch.arange(0, 8, 2) / 8)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(dict, id="plain"),
        pytest.param(lambda s: {f"module.{n}": t for n, t in s.items()}, id="ddp"),
        pytest.param(lambda s: {f"_orig_mod.{n}": t for n, t in s.items()}, id="compiled"),
        pytest.param(lambda s: {f"base_model.model.{n}": t for n, t in s.items()}, id="peft"),
        pytest.param(lambda s: {n[len("model.") :]: t for n, t in s.items()}, id="base"),
        pytest.param(
            lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"].clone()}, id="head"
        ),
        pytest.param(lambda s: s | {LAYER + "rotary_emb.inv_freq": ANGLES.bfloat16()}, id="angles"),
        pytest.param(lambda s: s | {"model.rotary_emb.inv_freq": ANGLES}, id="angles of the model"),
    ],
)
def test_every_accepted_form_of_a_directory_gives_the_same_logits(change, source, tmp_path):
    rewrite(source, change)
    convert(str(source), tmp_path / "mor")
    ids = tokens(2, 20)
    with torch.inference_mode():
        close(checkpoint.load(tmp_path / "mor").model(ids).logits_BTV, llama()(ids).logits)


def test_shards_and_an_untied_head_are_read_and_written(tmp_path):
    theirs = llama(tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path / "llama", max_shard_size="30KB")
    chat_tokenizer().save_pretrained(tmp_path / "llama")
    assert (tmp_path / "llama" / "model.safetensors.index.json").is_file()
    convert(str(tmp_path / "llama"), tmp_path / "mor")
    convert(str(tmp_path / "mor"), tmp_path / "again", to="llama")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], t) for name, t in theirs.state_dict().items())
    next((tmp_path / "llama").glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"index\.json names files that are missing: model-00002"):
        convert(str(tmp_path / "llama"), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (without("embed_tokens.weight"), {}, r"missing: embed_tokens\.weight"),
        (without("3.mlp.up_proj.weight"), {}, r"missing: layers\.3\.mlp\.up_proj\.weight"),
        (
            adding(LAYER + "q_proj.bias", 48),
            {},
            r"left over: .*self_attn\.q_proj\.bias",
        ),
        (adding("score.weight", 2, 30), {}, r"left over: score\.weight"),
        (adding("lm_head.weight", 259, 30), {}, "differs from the embedding, though the"),
        (
            None,
            {"tie_word_embeddings": False},
            r"no lm_head\.weight, though the settings",
        ),
        (None, {"num_hidden_layers": 7}, r"left over: model\.layers\.7\.input_layernorm"),
        (None, {"num_hidden_layers": 9}, r"missing: layers\.8\.input_layernorm"),
        (None, {"num_key_value_heads": 3}, r"k_proj\.weight is \(16, 30\), should be \(24, 30\)"),
        (None, {"vocab_size": 260}, r"embed_tokens\.weight is \(259, 30\), should be \(260, 30\)"),
        (None, {"vocab_size": 10**12}, r"should be \(10{12}, 30\)"),
        (None, {"attention_bias": True}, "attention_bias=True"),
        (None, {"hidden_size": "x"}, r"config\.json: transformers does not take it: .*hidden_size"),
        (None, {"rope_interleaved": True}, "rope_interleaved=True"),
        (None, {"rope_parameters": {"rope_theta": 5.0, "rope_type": "yarn", "factor": 2}}, "rope_"),
        (adding(LAYER + "rotary_emb.inv_freq", 4), {}, "other rotary angles than rope_theta=777"),
        (adding("model.rotary_emb.inv_freq", 4), {}, "other rotary angles than rope_theta=777"),
        (None, {"quantization_config": {"quant_method": "not gguf"}}, "weights are quantized"),
        (adding("model.norm.weight", 30, 2), {}, r"norm\.weight is \(30, 2\), should be \(30,\)"),
        (lambda s: s | {"model.norm.weight": torch.full((30,), torch.nan)}, {}, "not finite"),
        (lambda s: s | {"model.norm.weight": torch.ones(30).char()}, {}, r"stored as torch\.int8"),
        (lambda s: {("module." if "norm" in n else "") + n: t for n, t in s.items()}, {}, "module"),
    ],
)
def test_a_directory_that_is_not_its_config_is_refused_and_nothing_written(
    change, settings, words, source, tmp_path
):
    rewrite(source, change, **settings)
    with pytest.raises(ValueError, match=words):
        convert(str(source), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_a_tokenizer_larger_than_the_embedding_is_named(source, tmp_path):
    larger = chat_tokenizer()
    larger.add_tokens(["one more"])
    larger.save_pretrained(source)
    with pytest.raises(ValueError, match=r"llama: the tokenizer has ids up to 259, .* 0\.\.258"):
        convert(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_too_large_for_a_dtype_are_not_written(tmp_path):
    ours = from_llama(llama())
    with torch.no_grad():
        ours.final_norm.weight[0] = 1e6
    checkpoint.save(tmp_path / "mor", ours, Tokenizer.from_transformers(chat_tokenizer()))
    for to in ("mor", "llama"):
        with pytest.raises(ValueError, match=r"norm\.weight in the model to save has 1 values"):
            convert(str(tmp_path / "mor"), tmp_path / "out", to=to, dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_model_of_the_hub_is_read_as_its_directory_is(source, tmp_path, monkeypatch):
    asked = []

    def snapshot(name, **settings):
        asked.append(name)
        if name != "owner/model":
            raise OSError("no such\nrepository")
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    found = read_source("owner/model").model.state_dict()
    expected = from_llama(llama()).state_dict()
    assert all(torch.equal(found[name], t) for name, t in expected.items())
    with pytest.raises(ValueError, match=r"owner/other is not a directory, .*: no such repository"):
        read_source("owner/other")
    assert asked == ["owner/model", "owner/other"]


def test_weights_of_several_types_are_read_in_one_that_holds_them_all(source, tmp_path):
    rewrite(source, lambda s: {n: t if "norm" in n else t.bfloat16() for n, t in s.items()})
    convert(str(source), tmp_path / "mor")
    stored = load_file(tmp_path / "mor" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32}


def test_code_beside_a_model_does_not_run(source, tmp_path):
    (source / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    for name, classes in [
        ("config.json", {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "own.C"]}),
    ]:
        values = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps(values | {"auto_map": classes}))
    assert read_source(str(source)).config.dim == 30
    rewrite(source, model_type="own")
    with pytest.raises(ValueError, match=r"config\.json: transformers does not take it"):
        read_source(str(source))
    assert not (tmp_path / "ran").exists()
