"""A small random Llama with a chat tokenizer, to convert."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mor.conversion.initialise import recursive_init
from mor.data.tokenizer import byte_tokenizer
from mor.model.config import layout

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = dict(
    vocab_size=259,
    hidden_size=30,
    intermediate_size=44,
    num_hidden_layers=8,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,  # not hidden_size / heads
    max_position_embeddings=128,
    rms_norm_eps=3e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 777.0},
    initializer_range=0.15,
    bos_token_id=257,
    eos_token_id=258,
    pad_token_id=258,
)


def llama(seed=0, kind=(LlamaConfig, LlamaForCausalLM), **changes):
    """A random model whose every weight, norms included, shows in the logits."""
    torch.manual_seed(seed)
    model = kind[1](kind[0](**SIZES | {"tie_word_embeddings": True} | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def chat_tokenizer():
    """256 bytes, end-of-text and the two marks of a chat; 259 tokens."""
    backend = byte_tokenizer().backend
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=99,
        chat_template=TEMPLATE,
    )


def save_llama(path):
    """A Llama directory as transformers writes it."""
    llama().save_pretrained(path)
    chat_tokenizer().save_pretrained(path)
    return path


def tokens(*shape):
    return torch.randint(0, 259, shape, generator=torch.Generator().manual_seed(1))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def initialised(source, recursions, sharing, init, num_layers=None, **changes):
    config = source.config.replace(
        **layout(num_layers or source.config.num_layers, recursions, sharing), **changes
    )
    return recursive_init(source, config, init)
