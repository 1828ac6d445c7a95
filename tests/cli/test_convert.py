"""mor convert: what it prints, and what it refuses."""

import errno
import json
import os
import shutil

import pytest
from safetensors import SafetensorError

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


def test_deepening_from_the_command_line(folder, tmp_path, capsys):
    deepen = ["--deepen", "--block", "2:5", "--num-recursions", "3", "--adapter", "lora:4:6"]
    main(["convert", str(folder), str(tmp_path / "deep"), *deepen])
    shown = capsys.readouterr().out
    assert "2+3x3+3 = 14 effective" in shown and "it is the source" in shown
    config = checkpoint.load(tmp_path / "deep").config
    assert (config.lora_rank, config.lora_scale, config.deepened) == (4, 1.5, True)
    assert (config.router.kind, config.kv_strategy) == ("gain", "hybrid")
    main(["convert", str(folder), str(tmp_path / "b"), "--deepen", "--block", "0:8", "--json"])
    assert last_json(capsys)["layout"] == "0+8x2+0"
    once = ["--deepen", "--block", "2:5", "--num-recursions", "1", "--adapter", "lora:4"]
    main(["convert", str(folder), str(tmp_path / "once"), *once])
    config = checkpoint.load(tmp_path / "once").config
    assert (config.layout_name, config.lora_from, config.deepened) == ("2+3x1+3", 1, False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["out", "--deepen"], "--deepen needs --block FIRST:END"),
        (["out", "--deepen", "--block", "2-5"], "--deepen needs --block FIRST:END"),
        (["out", "--deepen", "--block", "2:9"], "0 <= FIRST < END <= 8"),
        (["out", "--deepen", "--block", "2:5", "--adapter", "lora"], "lora:RANK:ALPHA"),
        (["out", "--deepen", "--block", "2:5", "--init", "lower"], "leave out --init"),
        (["out", "--deepen", "--block", "2:5", "--to", "llama"], "leave out num_recursions"),
        (["out", "--block", "2:5"], "no effect without --deepen"),
        (["--text", "a.txt"], "no effect without --suggest-split"),
        ([], "mor convert SOURCE OUT"),
        (["--suggest-split", "--block-layers", "7"], "1 to 6"),
    ],
)
def test_what_deepening_cannot_do_is_said(arguments, words, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("One line after the other.\n" * 40)
    text = ["--text", "a.txt"] if "--suggest-split" in arguments else []
    with pytest.raises(SystemExit):
        main(["convert", str(folder), *arguments, *text])
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_proposed_split(folder, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("One line after the other.\n" * 400)
    command = ["convert", str(folder), "--suggest-split", "--text", str(tmp_path / "a.txt")]
    main([*command, "--block-layers", "3", "--json"])
    found = last_json(capsys)
    assert [split["block"][1] - split["block"][0] for split in found] == [3] * 4
    distances = [split["distance"] for split in found]
    assert distances == sorted(distances) and 0 < distances[0] < 1
    main(command)
    assert "--block" in capsys.readouterr().out


def test_a_proposed_split_has_no_use_for_other_flags_and_adapters_fit(folder, tmp_path, capsys):
    for flags, said in (
        (["--suggest-split", "--dtype", "float16"], "--dtype has no effect with --suggest-split"),
        (
            [str(tmp_path / "a"), "--deepen", "--block", "2:4", "--adapter", "lora:99999999999"],
            "lora_rank=99999999999 is larger than any matrix",
        ),
    ):
        with pytest.raises(SystemExit):
            main(["convert", str(folder), *flags])
        assert said in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    main(["convert", str(folder), str(tmp_path / "whole")])
    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.setattr(shutil, "copyfile", lambda *_, **__: no_space())
    monkeypatch.setattr(shutil, "copy2", lambda *_, **__: no_space())
    for flags in ([str(folder), "x"], [str(tmp_path / "whole"), "y", "--to", "remote-code"]):
        source, out, *rest = flags
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(["convert", source, str(tmp_path / out), *rest])
        said = capsys.readouterr().err
        assert said.startswith("error: could not write") and "No space left" in said
        assert said.count("\n") == 1 and not (tmp_path / out).exists()


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
