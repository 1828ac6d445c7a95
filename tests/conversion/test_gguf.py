"""GGUF files: the model, its tokenizer, and what transformers overlooks."""

import gguf
import pytest
import torch

from mor import checkpoint
from mor.conversion.convert import convert
from tests.small_llama import TEMPLATE, chat_tokenizer, close, llama, tokens


def write_gguf(path, model, pre="smollm", scaling=None):
    """A GGUF as llama.cpp makes it: query and key rows in its own rotary order."""
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
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

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, weight in model.named_parameters():
        if ".q_proj" in name or ".k_proj" in name:
            weight = reordered(
                weight, c.num_attention_heads if ".q_proj" in name else c.num_key_value_heads
            )
        writer.add_tensor(names.get_name(name, (".weight",)), weight.detach().contiguous().numpy())
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
    with pytest.raises(ValueError, match=r"rope\.scaling\.type='yarn'"):
        convert(str(tmp_path / "a.gguf"), tmp_path / "mor")
    write_gguf(tmp_path / "b.gguf", llama(vocab_size=261), pre="llama-bpe")
    with pytest.warns(UserWarning, match="rule 'llama-bpe'"):
        convert(str(tmp_path / "b.gguf"), tmp_path / "mor")
