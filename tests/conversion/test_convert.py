"""Conversions from directory to directory: weights, tokenizers and templates."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mor import checkpoint
from mor.conversion.convert import convert
from mor.data.tokenizer import Tokenizer
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
