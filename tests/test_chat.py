"""Chat: the tokenizer's own template, from the command line and from Python."""

import io
import json

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from mor import checkpoint
from mor.chat import Chat
from mor.cli import main
from mor.conversion.convert import convert
from mor.data.tokenizer import Tokenizer, byte_tokenizer
from tests.small_llama import chat_tokenizer, save_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "source")


@pytest.fixture(scope="module")
def chatty(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("chatty") / "mor"
    convert(str(folder), path)
    return path


def last_json(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


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
        ([str(chatty), "--prompt", "x", "--system", "y"], "--system has no effect without --chat"),
    ]:
        with pytest.raises(SystemExit):
            main(["generate", *arguments])
        assert words in capsys.readouterr().err


def test_a_template_that_raises_is_an_error_that_says_so():
    theirs = chat_tokenizer()
    theirs.chat_template = "{{ raise_exception('no assistants here') }}"
    with pytest.raises(ValueError, match=r"does not take .* user, assistant: no assistants here"):
        Chat(Tokenizer.from_transformers(theirs))
    theirs.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ 1 / (messages | length - 3) }}"
    )
    chat = Chat(Tokenizer.from_transformers(theirs))
    turns = [{"role": role, "content": "x"} for role in ("system", "user", "user")]
    with pytest.raises(ValueError, match="system, user, user: division by zero"):
        chat.prompt(turns)
