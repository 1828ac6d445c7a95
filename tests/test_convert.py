"""Conversions from directory to directory, and what `mor convert` prints."""

import json

import pytest
import torch
from small_llama import SIZES, TEMPLATE, chat_tokenizer, save_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mor import checkpoint
from mor.cli import main
from mor.conversion.convert import convert
from mor.data.tokenizer import Tokenizer


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
