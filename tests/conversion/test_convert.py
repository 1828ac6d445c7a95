"""Conversions from directory to directory: weights, tokenizers and templates."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mor import checkpoint
from mor.chat import Chat
from mor.cli import main
from mor.conversion.convert import convert
from mor.conversion.remote_code import export
from mor.data.tokenizer import Tokenizer
from mor.engine import Engine
from mor.generation import SamplingParams
from tests.small_llama import SIZES, TEMPLATE, chat_tokenizer, save_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "source")


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


GENERATION = dict(
    bos_token_id=257,
    eos_token_id=[0, 258, 7],
    pad_token_id=258,
    do_sample=True,
    temperature=0.6,
    top_k=7,
    repetition_penalty=1.25,
)


def generation_of(path):
    values = json.loads((path / "generation_config.json").read_text())
    return {name: values.get(name) for name in GENERATION}


def test_generation_settings_survive_every_way(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps(GENERATION))
    convert(str(source), tmp_path / "mor")
    convert(str(tmp_path / "mor"), tmp_path / "deep", num_recursions=2)
    convert(str(tmp_path / "mor"), tmp_path / "llama", to="llama")
    convert(str(tmp_path / "mor"), tmp_path / "mor2", dtype="bfloat16")
    export(tmp_path / "mor", tmp_path / "code")
    hub = AutoModelForCausalLM.from_pretrained(tmp_path / "mor")
    hub.save_pretrained(tmp_path / "hub")
    AutoTokenizer.from_pretrained(tmp_path / "mor").save_pretrained(tmp_path / "hub")
    loaded = checkpoint.load(tmp_path / "hub")
    checkpoint.save(tmp_path / "again", loaded.model, loaded.tokenizer)
    for name in ("mor", "deep", "llama", "mor2", "code", "hub", "again"):
        assert generation_of(tmp_path / name) == GENERATION, name
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["eos_token_id"] == [0, 258, 7], name
    for name in ("mor", "llama"):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name).generation_config
        assert {key: getattr(theirs, key) for key in GENERATION} == GENERATION


def test_a_tokenizer_for_another_model_keeps_the_ids_and_not_how_to_sample(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps(GENERATION))
    found = Tokenizer.find(str(source))
    assert found.end_ids == (0, 258, 7)
    assert json.loads(found.files["generation_config.json"]) == {
        name: value for name, value in GENERATION.items() if name.endswith("token_id")
    }


@pytest.mark.parametrize(
    ("given", "ends"),
    [(None, (258,)), (258, (258,)), ([0, 7], (0, 7, 258)), (7, (7, 258)), ([], (258,))],
)
def test_the_end_of_documents_always_ends_a_text(given, ends, folder, tmp_path):
    values = {} if given is None else {"eos_token_id": given}
    source = shutil.copytree(folder, tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps(values | {"top_k": 3}))
    convert(str(source), tmp_path / "mor")
    assert checkpoint.load(tmp_path / "mor").tokenizer.end_ids == ends
    config = json.loads((tmp_path / "mor" / "config.json").read_text())
    assert config["eos_token_id"] == (list(ends) if len(ends) > 1 else ends[0])


def test_old_directories_name_their_ends_in_the_config(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "source")
    (source / "generation_config.json").unlink()
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | {"eos_token_id": [258, 7]}))
    convert(str(source), tmp_path / "mor")
    assert checkpoint.load(tmp_path / "mor").tokenizer.end_ids == (258, 7)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *(
            ("eos_token_id", each)
            for each in ("</s>", [1.5], -1, [True], {"a": 1}, 2**70, [258, 259])
        ),
        *(("pad_token_id", each) for each in (9999, -2, [258])),
        *(("bos_token_id", each) for each in ("x", 259, -1)),
    ],
)
@pytest.mark.parametrize("to", ["mor", "llama"])
def test_special_ids_that_are_no_tokens_are_named(name, given, to, folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps({name: given}))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    del settings["eos_token"]  # then the model's settings decide
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    words = rf"generation_config\.json: {name}=.* is not a token of the model: ids are 0\.\.258$"
    with pytest.raises(ValueError, match=words):
        convert(str(source), tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_padding_of_minus_one_is_none_in_both_directions(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "source")
    values = {"eos_token_id": 258, "pad_token_id": -1}
    (source / "generation_config.json").write_text(json.dumps(values))
    for to in ("mor", "llama"):
        convert(str(source), tmp_path / to, to=to)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / to)
        assert theirs.generation_config.pad_token_id is None
        assert theirs.generation_config.eos_token_id == 258


def test_every_decoder_stops_at_every_end(folder, tmp_path, capsys):
    prompt = "né 12"
    ids = Tokenizer.load(folder).encode(prompt)
    free = AutoModelForCausalLM.from_pretrained(folder).generate(
        torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    written = free[0, len(ids) :].tolist()
    end = written[3]
    expected = written[: written.index(end) + 1]
    source = shutil.copytree(folder, tmp_path / "source")
    values = {"eos_token_id": [258, end], "pad_token_id": 258}
    (source / "generation_config.json").write_text(json.dumps(values))
    convert(str(source), tmp_path / "mor")
    convert(str(tmp_path / "mor"), tmp_path / "llama", to="llama")
    for name in ("mor", "llama"):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        found = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
        assert found[0, len(ids) :].tolist() == expected, name
    _, model, tokenizer = checkpoint.load(tmp_path / "mor")
    params = SamplingParams(max_new_tokens=8, temperature=0, stop_token_ids=tokenizer.end_ids)
    assert Engine(model, tokenizer).generate([prompt], params)[0].token_ids == expected
    assert set(tokenizer.end_ids) <= set(Chat(tokenizer).stop_token_ids)
    flags = ["--temperature", "0", "--max-new-tokens", "8"]
    main(["generate", str(tmp_path / "mor"), "--prompt", prompt, *flags, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["token_ids"] == expected and found["finish_reason"] == "stop"
    assert found["text"] == tokenizer.decode(expected[:-1])
