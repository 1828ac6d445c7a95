"""GGUF files: the model, its tokenizer, and what transformers overlooks."""

import json

import gguf
import numpy as np
import pytest
import torch

from mor import checkpoint
from mor.conversion.convert import convert, read_source
from tests.small_llama import TEMPLATE, chat_tokenizer, close, llama, tokens


def write_gguf(path, model, pre="smollm", scaling=None, change=None, arch="llama", **settings):
    """A GGUF as llama.cpp makes it: query and key rows in its own rotary order.

    change: of the dictionary of tensors. settings: further ones of the model, whole numbers.
    """
    c = model.config
    writer = gguf.GGUFWriter(path, arch)
    for name, value in settings.items():
        writer.add_uint32(f"llama.{name}", value)
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    vocabulary = sorted(chat_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*(token for token, _ in vocabulary), "he", "hi"])
    # 3: control, 1: normal
    writer.add_token_types([3 if 256 <= i < 259 else 1 for i in range(261)])
    writer.add_token_merges(["h e", "h i"])  # transformers 5.17 misreads a list of one
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_chat_template(TEMPLATE)

    def reordered(weight, heads):
        return weight.unflatten(0, (heads, 2, c.head_dim // 2)).transpose(1, 2).flatten(0, 2)

    tensors = {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, weight in model.named_parameters():
        if ".q_proj" in name or ".k_proj" in name:
            weight = reordered(
                weight, c.num_attention_heads if ".q_proj" in name else c.num_key_value_heads
            )
        tensors[names.get_name(name, (".weight",))] = weight.detach().contiguous().numpy()
    for name, tensor in (change or dict)(tensors).items():
        quantized = tensor.dtype == np.uint8
        writer.add_tensor(
            name, tensor, raw_dtype=gguf.GGMLQuantizationType.Q8_0 if quantized else None
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_read_with_its_tokenizer(tmp_path):
    theirs = llama(vocab_size=261)
    write_gguf(tmp_path / "tiny.gguf", theirs)
    convert(str(tmp_path / "tiny.gguf"), tmp_path / "mor")
    _, ours, tokenizer = checkpoint.load(tmp_path / "mor")
    ids = tokens(2, 40)
    with torch.inference_mode():
        close(ours(ids).logits_BTV, theirs(ids).logits)
    assert (
        tokenizer.end_of_text == "<|im_end|>"
        and tokenizer.files["chat_template.jinja"].strip() == TEMPLATE
    )
    cut = [piece for piece, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str("in 1999")]
    assert cut == ["in", "Ġ", "1", "9", "9", "9"], "SmolLM cuts digits apart"


def test_what_transformers_overlooks_in_a_gguf_is_said(tmp_path):
    write_gguf(tmp_path / "a.gguf", llama(vocab_size=261), scaling=gguf.RopeScalingType.YARN)
    with pytest.raises(ValueError, match=r"a\.gguf: llama\.rope\.scaling\.type='yarn' is a"):
        convert(str(tmp_path / "a.gguf"), tmp_path / "mor")
    write_gguf(tmp_path / "b.gguf", llama(vocab_size=261), pre="llama-bpe")
    with pytest.warns(UserWarning, match="rule 'llama-bpe'"):
        convert(str(tmp_path / "b.gguf"), tmp_path / "mor")


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def adding(name, *shape):
    return lambda tensors: tensors | {name: np.ones(shape, np.float32)}


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (without("blk.3.ffn_up.weight"), {}, r"missing: blk\.3\.ffn_up\.weight"),
        (without("token_embd.weight"), {}, r"no token_embd\.weight"),
        (adding("rope_freqs.weight", 4), {}, r"left over: rope_freqs\.weight"),
        (adding("blk.0.attn_q.bias", 48), {}, r"left over: blk\.0\.attn_q\.bias"),
        (
            adding("output_norm.weight", 31),
            {},
            r"output_norm\.weight is \(31,\), should be",
        ),
        (lambda t: t | {"output_norm.weight": np.full(30, np.nan, np.float32)}, {}, "not finite"),
        (None, {"expert_count": 8}, r"llama\.expert_count=8 is a setting that mor does not have"),
        (None, {"attention.sliding_window": 64}, r"llama\.attention\.sliding_window=64"),
        (
            None,
            {"attention.key_length": 16},
            r"llama\.rope\.dimension_count=8 is not the size",
        ),
        (None, {"arch": "qwen2"}, r"general\.architecture='qwen2'"),
    ],
)
def test_what_mor_cannot_compute_is_named_and_nothing_written(change, settings, words, tmp_path):
    write_gguf(tmp_path / "a.gguf", llama(vocab_size=261), change=change, **settings)
    with pytest.raises(ValueError, match=words):
        convert(str(tmp_path / "a.gguf"), tmp_path / "mor")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_a_head_of_its_own_and_neutral_settings_are_read(tmp_path):
    theirs = llama(vocab_size=261, tie_word_embeddings=False)
    write_gguf(tmp_path / "a.gguf", theirs, expert_count=0)
    found = read_source(str(tmp_path / "a.gguf"))
    assert not found.config.tie_embeddings
    ids = tokens(2, 20)
    with torch.inference_mode():
        close(found.model(ids).logits_BTV, theirs(ids).logits)
    assert found.tokenizer.end_ids == (258,)
    assert json.loads(found.tokenizer.files["generation_config.json"])["bos_token_id"] == 257


def test_quantized_weights_are_what_the_format_says(tmp_path):
    theirs = llama(vocab_size=261, hidden_size=96)
    quantized = {}

    def rounded(tensors):
        for name in tensors:
            if "ffn_up" in name:
                quantized[name] = gguf.quantize(tensors[name], gguf.GGMLQuantizationType.Q8_0)
        return tensors | quantized

    write_gguf(tmp_path / "a.gguf", theirs, change=rounded)
    found = read_source(str(tmp_path / "a.gguf")).model
    for i, block in enumerate(found.recursions.shared_blocks):
        expected = gguf.dequantize(
            quantized[f"blk.{i}.ffn_up.weight"], gguf.GGMLQuantizationType.Q8_0
        )
        assert torch.equal(block.feed_forward.up_proj.weight, torch.tensor(expected))


@pytest.mark.parametrize("length", [0, 3, 200, -4000])
def test_a_file_cut_short_is_named(length, tmp_path):
    write_gguf(tmp_path / "a.gguf", llama(vocab_size=261))
    (tmp_path / "a.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:length])
    with pytest.raises(ValueError, match=r"a\.gguf is damaged"):
        read_source(str(tmp_path / "a.gguf"))
