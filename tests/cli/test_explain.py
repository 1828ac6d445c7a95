"""mor explain: the page it writes, the JSON it prints, and its mistakes."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from mor import checkpoint
from mor.cli import main
from mor.data.problems import StateTracking
from mor.data.tokenizer import byte_tokenizer, train_bpe
from tests.conftest import tiny


def test_explaining_does_not_load_what_takes_a_second_to_import(run, tmp_path):
    code = (
        "import sys; from mor.cli import main; main(sys.argv[1:]); "
        "print(sorted({'torch._dynamo', 'torch.distributed.checkpoint', 'sympy', 'transformers'} & "
        "set(sys.modules)))"
    )
    command = [
        "explain",
        str(run / "run"),
        "--text",
        "The square of 3 is",
        "--out",
        str(tmp_path / "page.html"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True
    )
    assert (tmp_path / "page.html").is_file() and done.stdout.splitlines()[-1] == "[]"


TEXT = (
    "The cat </script> sat on 12 mats; naïve 日本 & <b>two</b> dogs\nwatched.\n\n"
    "Then they left, one by one."
)


def data_of(page):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, tokenizer in (("bytes", byte_tokenizer()), ("bpe", train_bpe([TEXT * 3], 280))):
        model = tiny("expert_choice", vocab_size=tokenizer.vocab_size)
        checkpoint.save(folder / name, model, tokenizer)
    return folder


def test_the_command_writes_a_page_and_prints_json(checkpoints, tmp_path, capsys):
    out = tmp_path / "page.html"
    main(["explain", str(checkpoints / "bytes"), "--text", TEXT, "--out", str(out)])
    assert "mean depth" in capsys.readouterr().out and len(data_of(out.read_text())["models"]) == 1
    (tmp_path / "text.txt").write_text(TEXT)
    source = [
        "--file",
        str(tmp_path / "text.txt"),
        "--max-tokens",
        "40",
        "--corpus",
        str(tmp_path / "text.txt"),
    ]
    main(
        [
            "explain",
            str(checkpoints / "bytes"),
            *source,
            "--compare",
            str(checkpoints / "bpe"),
            "--json",
        ]
    )
    one, two = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["models"]
    assert len(one["tokens"]) == 40 and one["text"] == two["text"] == TEXT[: len(one["text"])]
    assert one["tokens"][0]["count"] == TEXT.encode().count(b"T") and len(two["tokens"]) < 40
    main(
        [
            "explain",
            str(checkpoints / "bpe"),
            *source[:4],
            "--compare",
            str(checkpoints / "bytes"),
            "--json",
        ]
    )
    one, two = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["models"]
    assert len(one["tokens"]) < 40 == len(two["tokens"]) and one["text"] == two["text"], (
        "no more of either model"
    )
    assert list(tmp_path.glob("*.html")) == [out], "--json alone writes no page"


def test_the_limit_holds_for_both_models(checkpoints, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT * 25)
    arguments = ["explain", str(checkpoints / "bpe"), "--file", str(tmp_path / "text.txt")]
    assert len(checkpoint.load(checkpoints / "bpe").tokenizer.encode(TEXT * 25)) < 2048
    with pytest.raises(SystemExit):
        main([*arguments, "--compare", str(checkpoints / "bytes")])
    error = capsys.readouterr().err
    assert (
        "bytes are too many for a page; --max-tokens 2048" in error
        and f"{25 * len(TEXT.encode()):,} tokens" in error
    )


def test_names_are_printed_as_they_are(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoints / "bytes", "[red]:smile:[/x]")
    main(["explain", "[red]:smile:[/x]", "--text", "abc", "--out", "[b].html"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("[b].html: ") and second.startswith("[red]:smile:[/x]: 3 tokens")


def test_a_run_on_a_task_is_judged_by_its_answers(tmp_path, capsys):
    task = "task:state-tracking?states=4&moves=3"
    setting = [
        "--preset",
        "tiny",
        "--num-recursions",
        "3",
        "--data.path",
        task,
        "--steps",
        "1",
        "--seq-len",
        "16",
    ]
    main(["train", *setting, "--batch-size", "2", "--out", str(tmp_path / "run")])
    main(["explain", str(tmp_path / "run"), "--text", "p0 =3 =1 p2", "--json"])
    (found,) = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["models"]
    after = StateTracking(states=4, moves=3).permutations()[2, 1]
    assert [t["target"] for t in found["tokens"]] == [None, "3", "1", str(int(after))]
    assert found["asked"] == "answer" and found["summary"]["bits_per_byte"] is None
    with pytest.raises(SystemExit):
        main(["explain", str(tmp_path / "run"), "--text", "=3 hello"])
    assert "no word 'hello'; its words are 0 1 2 3 =0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--text TEXT or as --file"),
        (["--text", "a", "--file", "b"], "--text TEXT or as --file"),
        (["--text", ""], "text is empty"),
        (["--text", "a" * 3000], "--max-tokens 2048"),
        (["--text", "abc", "--window", "65"], "window must lie in 2..64"),
        (["--text", "abc", "--guesses", "0"], "guesses must be at least 1, got 0"),
        (["--text", "abc", "--max-tokens", "0"], "max_tokens must be at least 1, got 0"),
        (["--text", "abc", "--out", "missing/page.html"], "is not a folder"),
        (["--text", "abc", "--out", "."], "--out: . is a folder, and a file is needed"),
        (["--file", "missing.txt"], "missing.txt"),
        (["--text", "a\udcff"], "the text is not valid UTF-8"),
    ],
)
def test_mistakes_end_in_one_line_that_helps(checkpoints, arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["explain", str(checkpoints / "bytes"), *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1
