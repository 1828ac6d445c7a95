"""Llama models in and out, and where the layers of a recursive or MoR initialisation come from."""

import io
import json

import gguf
import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from mor import checkpoint
from mor.cli import main
from mor.conversion.convert import convert
from mor.conversion.initialise import fitting_depth, layer_sources, recursive_init
from mor.conversion.layers import stored_layers
from mor.conversion.llama import from_llama, llama_config, to_llama
from mor.data.tokenizer import Tokenizer, byte_tokenizer
from mor.generation import SamplingParams, generate
from mor.model.config import RouterConfig, layout
from mor.model.transformer import Transformer

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama directory as transformers writes it."""
    path = tmp_path_factory.mktemp("llama") / "source"
    llama().save_pretrained(path)
    chat_tokenizer().save_pretrained(path)
    return path


def tokens(*shape):
    return torch.randint(0, 259, shape, generator=torch.Generator().manual_seed(1))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# Llama in and out


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


# Initialisations


def initialised(source, recursions, sharing, init, num_layers=None, **changes):
    config = source.config.replace(
        **layout(num_layers or source.config.num_layers, recursions, sharing), **changes
    )
    return recursive_init(source, config, init)


# METHOD of the paper: shared layer of unrolled layer i, for L layers and R recursions
POOL_INDEX = {
    "cycle": lambda i, L, R: i % (L // R),
    "sequence": lambda i, L, R: i // R,
    "middle_cycle": lambda i, L, R: (i - 1) % ((L - 2) // R) + 1,
    "middle_sequence": lambda i, L, R: (i - 1) // R + 1,
}
CHOSEN = {  # of 8 layers, for two recursions: shared layers 0..7, or 1..6 with own ends
    ("stepwise", "plain"): [0, 2, 5, 7],
    ("lower", "plain"): [0, 1, 2, 3],
    ("upper", "plain"): [4, 5, 6, 7],
    ("stepwise", "middle"): [0, 1, 4, 6, 7],
    ("lower", "middle"): [0, 1, 2, 3, 7],
    ("upper", "middle"): [0, 4, 5, 6, 7],
}


@pytest.mark.parametrize("sharing", POOL_INDEX)
@pytest.mark.parametrize("init", ["stepwise", "average", "lower", "upper"])
def test_every_layer_starts_where_it_should(init, sharing):
    source = from_llama(llama(tie_word_embeddings=False))
    layers = [block.state_dict() for block in source.recursions.shared_blocks]
    made = initialised(source, 2, sharing, init)
    middle = sharing.startswith("middle")
    if init == "average":
        groups = {}
        for i in range(8):
            own = middle and i in (0, 7)
            groups.setdefault(("own", i) if own else POOL_INDEX[sharing](i, 8, 2), []).append(i)
        last = [groups.pop(("own", i)) for i in (0, 7)] if middle else []
        expected = [*last[:1], *(groups[i] for i in sorted(groups)), *last[1:]]
    else:
        expected = [[i] for i in CHOSEN[init, "middle" if middle else "plain"]]
    blocks = stored_layers(made)
    assert len(blocks) == len(expected) == (5 if middle else 4)
    for block, group in zip(blocks, expected, strict=True):
        for name, weight in block.state_dict().items():
            close(weight, sum(layers[i][name] for i in group) / len(group), atol=1e-7)
    for name in ("embedding", "final_norm", "head"):
        assert torch.equal(getattr(made, name).weight, getattr(source, name).weight)


@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle"])
def test_random_keeps_only_what_is_not_shared(sharing):
    source = from_llama(llama())
    made = initialised(source, 2, sharing, "random", router=RouterConfig(kind="expert_choice"))
    fresh = Transformer(made.config).init_weights(0)
    for name, weight in made.recursions.state_dict().items():
        assert torch.equal(weight, fresh.recursions.state_dict()[name]), name
    drawn = made.recursions.shared_blocks[0].feed_forward.up_proj.weight
    assert abs(drawn.std().item() / SIZES["initializer_range"] - 1) < 0.1
    assert torch.equal(made.embedding.weight, source.embedding.weight)
    assert torch.equal(made.final_norm.weight, source.final_norm.weight)
    if sharing == "middle_cycle":
        for block, i in [(made.prelude[0], 0), (made.coda[0], 7)]:
            own = source.recursions.shared_blocks[i].state_dict()
            assert all(
                torch.equal(weight, own[name]) for name, weight in block.state_dict().items()
            )


def test_routers_start_as_init_weights_makes_them():
    source = from_llama(llama())
    made = initialised(
        source, 3, "middle_cycle", "upper", router=RouterConfig(kind="expert_choice")
    )
    fresh = Transformer(made.config).init_weights(0).recursions.router.state_dict()
    found = made.recursions.router.state_dict()
    assert found.keys() == fresh.keys() and all(
        torch.equal(found[name], fresh[name]) for name in fresh
    )


@pytest.mark.parametrize("sharing", POOL_INDEX)
@pytest.mark.parametrize("init", ["stepwise", "average", "lower", "upper"])
def test_where_all_layers_are_equal_sharing_them_changes_nothing(init, sharing):
    theirs = llama()
    for layer in theirs.model.layers[1:]:
        layer.load_state_dict(theirs.model.layers[0].state_dict())
    source, ids = from_llama(theirs), tokens(2, 40)
    with torch.inference_mode():
        close(initialised(source, 2, sharing, init)(ids).logits_BTV, source(ids).logits_BTV)


@pytest.mark.parametrize(
    ("shared", "source", "expected"),
    [
        (1, 6, [0]),
        (2, 6, [0, 5]),
        (3, 6, [0, 3, 5]),
        (4, 28, [0, 9, 18, 27]),
        (9, 28, [0, 3, 7, 10, 14, 17, 20, 24, 27]),
    ],
)
def test_stepwise_takes_regular_intervals_with_both_ends_and_rounds_halves_up(
    shared, source, expected
):
    config = llama_config(LlamaConfig(**SIZES)).replace(shared_layers=shared, num_recursions=2)
    assert layer_sources(config, source, "stepwise") == [(i,) for i in expected]


@pytest.mark.parametrize("recursions", [2, 3, 4, 5])
@pytest.mark.parametrize("sharing", POOL_INDEX)
@pytest.mark.parametrize("num_layers", [11, 30, 31, 32])
def test_average_uses_every_source_layer_once_at_every_depth(num_layers, sharing, recursions):
    shape = layout(fitting_depth(num_layers, recursions, sharing), recursions, sharing)
    config = llama_config(LlamaConfig(**SIZES)).replace(**shape)
    groups = layer_sources(config, num_layers, "average")
    assert all(groups) and sorted(i for group in groups for i in group) == list(range(num_layers))
    if sharing.endswith("sequence"):
        assert [i for group in groups for i in group] == list(range(num_layers)), (
            "neighbours stay together"
        )


@pytest.mark.parametrize(
    ("num_layers", "recursions", "sharing", "expected"),
    [
        (30, 3, "middle_cycle", 29),
        (30, 2, "middle_cycle", 30),
        (32, 3, "cycle", 33),
        (31, 2, "cycle", 32),
        (24, 4, "middle_cycle", 26),
        (3, 2, "middle_cycle", 4),
        (2, 3, "middle_cycle", 5),
        (7, 1, "middle_cycle", 7),
    ],
)
def test_the_nearest_depth_is_chosen_and_of_two_the_deeper(
    num_layers, recursions, sharing, expected
):
    assert fitting_depth(num_layers, recursions, sharing) == expected
    layout(expected, recursions, sharing)  # it fits


def test_impossible_initialisations_are_refused():
    source = from_llama(llama())
    with pytest.raises(ValueError, match="which has 8"):
        initialised(source, 2, "middle_cycle", "lower", num_layers=18)
    with pytest.raises(ValueError, match="choose from stepwise, average"):
        initialised(source, 2, "cycle", "first")
    with pytest.raises(ValueError, match="dim=24 differs"):
        recursive_init(source, source.config.replace(dim=24))
    with pytest.raises(ValueError, match="replace none"):
        layer_sources(source.config.replace(shared_layers=7, num_recursions=3), 8, "average")


# Directories


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_there_and_back_through_directories(dtype, folder, tmp_path):
    done = convert(str(folder), tmp_path / "mor", dtype=dtype)
    assert done.family == "vanilla" and done.params_before == done.params_after
    convert(str(tmp_path / "mor"), tmp_path / "llama", to="llama")
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype="auto")
    assert type(after) is LlamaForCausalLM and after.dtype == before.dtype == getattr(
        torch, dtype or "float32"
    )
    state = after.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in before.state_dict().items())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(after.generation_config, name) == SIZES[name]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], (
        "nothing unfinished is left"
    )
    assert (
        len(
            {file.stat().st_mode for out in ("mor", "llama") for file in (tmp_path / out).iterdir()}
        )
        == 1
    )


def test_the_tokenizer_keeps_all_that_transformers_needs(folder, tmp_path):
    convert(str(folder), tmp_path / "mor")
    loaded = checkpoint.load(tmp_path / "mor")
    checkpoint.save(tmp_path / "again", loaded.model, loaded.tokenizer)
    before, after = (
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(tmp_path / "again"),
    )
    text, turns = "né <|im_end|> 12", [{"role": "user", "content": "hé"}]
    assert before(text).input_ids == after(text).input_ids == loaded.tokenizer.encode(text)
    for flag in (True, False):
        assert before.apply_chat_template(turns, tokenize=False, add_generation_prompt=flag) == (
            after.apply_chat_template(turns, tokenize=False, add_generation_prompt=flag)
        )
    assert (before.special_tokens_map, before.model_max_length) == (
        after.special_tokens_map,
        after.model_max_length,
    )
    assert after.model_max_length == 99 and loaded.tokenizer.end_of_text == "<|im_end|>"


def test_named_templates_and_old_special_token_files_are_kept(tmp_path):
    theirs = chat_tokenizer()
    theirs.chat_template = {"default": TEMPLATE, "tool_use": "{{ 'tools' }}"}
    theirs.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "special_tokens_map.json").write_text(
        '{"eos_token": {"content": "<|im_end|>"}}'
    )
    settings = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "b").mkdir()
    Tokenizer.load(tmp_path / "a").save(tmp_path / "b")
    again = Tokenizer.load(tmp_path / "b")
    assert again.end_of_text == "<|im_end|>"
    assert again.to_transformers().get_chat_template("tool_use") == "{{ 'tools' }}"


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


# Command line


def last_json(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_convert_prints_where_layers_came_from(folder, tmp_path, capsys):
    main(
        [
            "convert",
            str(folder),
            str(tmp_path / "a"),
            "--num-recursions",
            "4",
            "--gate",
            "residual",
            "--alpha",
            "1",
        ]
    )
    shown = capsys.readouterr().out
    assert "MoR model in float32, written for mor" in shown and "1+2x4+1 = 10 effective" in shown
    assert "shared 1   <- source layer 6" in shown and "coda 0     <- source layer 7" in shown
    router = checkpoint.load(tmp_path / "a").config.router
    assert (router.kind, router.gate, router.alpha) == ("expert_choice", "residual", 1.0)
    common = [
        "--num-recursions",
        "2",
        "--router",
        "fixed",
        "--init",
        "average",
        "--sharing",
        "sequence",
        "--json",
    ]
    main(["convert", str(folder), str(tmp_path / "b"), *common])
    found = last_json(capsys)
    assert found["family"] == "recursive" and found["layers"]["shared 3"] == [6, 7]
    assert checkpoint.load(tmp_path / "b").config.shared_order == "sequence"
    main(["convert", str(tmp_path / "b"), str(tmp_path / "c"), "--num-recursions", "1", "--json"])
    assert last_json(capsys)["layers"]["shared 7"] == [7], "a recursive source counts unrolled"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{source}", "{full}"], "exists; choose another directory"),
        (
            ["{source}", "{out}", "--num-recursions", "3", "--num-layers", "9"],
            "nearest valid: 8 or 11",
        ),
        (
            ["{source}", "{out}", "--num-recursions", "2", "--sharing", "sequence"],
            "needs shared_order='cycle'",
        ),
        (["{source}", "{out}", "--init", "lower"], "add --num-recursions"),
        (
            ["{source}", "{out}", "--to", "llama", "--num-recursions", "2"],
            "leave out num_recursions",
        ),
        (["{full}", "{out}"], "neither a checkpoint"),
        (["/no/such/place", "{out}"], "does not exist"),
        (["{source}/config.json", "{out}"], "not a .gguf"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_written(arguments, words, folder, tmp_path, capsys):
    places = {"source": folder, "out": tmp_path / "out", "full": tmp_path / "full"}
    places["full"].mkdir()
    (places["full"] / "note.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main(["convert", *(a.format(**places) for a in arguments)])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "note.txt"]


@pytest.fixture(scope="module")
def chatty(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("chatty") / "mor"
    convert(str(folder), path)
    return path


def test_chat_sends_the_template_and_prints_the_answer_alone(chatty, capsys, monkeypatch):
    common = ["generate", str(chatty), "--chat", "--max-new-tokens", "12", "--seed", "3"]
    main([*common, "--prompt", "hé", "--system", "Be brief.", "--json"])
    found = last_json(capsys)
    sent = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhé<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert found["prompt_ids"] == Tokenizer.load(chatty).encode(sent)
    main([*common, "--prompt", "hé", "--system", "Be brief."])
    answer = capsys.readouterr().out
    assert answer == found["text"] + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("hé\n\nmore\n"))
    main([*common, "--system", "Be brief."])
    assert capsys.readouterr().out.startswith(answer)


def test_a_chat_remembers_and_stops_at_the_end_of_an_answer(tmp_path):
    from mor.chat import Chat

    theirs = chat_tokenizer()
    theirs.eos_token = "<|endoftext|>"  # as in Llama 3, turns end with another token than texts
    chat = Chat(Tokenizer.from_transformers(theirs))
    assert sorted(chat.stop_token_ids) == [256, 258]
    turns = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    assert (
        chat.prompt(turns)
        == theirs.apply_chat_template(turns, add_generation_prompt=True).input_ids
    )


def test_a_prompt_begins_as_transformers_lets_it_begin(folder, chatty, tmp_path, capsys):
    theirs = chat_tokenizer()
    beginning = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 257)]
    )
    theirs.backend_tokenizer.post_processor = beginning
    checkpoint.save(
        tmp_path / "c", checkpoint.load(chatty).model, Tokenizer.from_transformers(theirs)
    )
    for path, expected in [
        (tmp_path / "c", theirs),
        (chatty, AutoTokenizer.from_pretrained(folder)),
    ]:
        main(["generate", str(path), "--prompt", "hé", "--max-new-tokens", "3", "--json"])
        assert last_json(capsys)["prompt_ids"] == expected("hé").input_ids
    tokenizer = Tokenizer.load(tmp_path / "c")
    assert tokenizer.encode_prompt("hé")[0] == 257 and 257 not in tokenizer.encode("hé"), (
        "documents have no beginning"
    )


def test_chat_needs_a_template_and_a_prompt_where_lines_are_not_read(chatty, tmp_path, capsys):
    checkpoint.save(tmp_path / "plain", checkpoint.load(chatty).model, byte_tokenizer())
    for arguments, words in [
        ([str(tmp_path / "plain"), "--chat", "--prompt", "x"], "has no chat template"),
        ([str(chatty)], "add --prompt"),
        ([str(chatty), "--prompt", "x", "--system", "y"], "add --chat"),
    ]:
        with pytest.raises(SystemExit):
            main(["generate", *arguments])
        assert words in capsys.readouterr().err
