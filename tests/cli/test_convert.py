"""mor convert: what it prints, and what it refuses."""

import json

import pytest

from mor import checkpoint
from mor.cli import main
from tests.small_llama import save_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "source")


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
