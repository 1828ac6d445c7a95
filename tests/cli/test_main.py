"""The command line as a whole: its commands, its help, its mistakes."""

import io
import os
import subprocess
import sys

import pytest

import mor
from mor.cli import main
from mor.cli.main import COMMANDS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["costs", "--preset", "smollm-36m"], "did you mean 'smollm-360m'"),
        (
            ["costs", "--preset", "tiny", "--num-recursions", "3", "--num-layers", "9"],
            "nearest valid: 8 or 11",
        ),
        (["eval", "nowhere"], "neither a checkpoint"),
        (["train", "--branch-from", "x"], "takes --cooldown-steps N"),
        (
            ["train", "--branch-from", "x", "--cooldown-steps", "3", "--optim.clip", "1"],
            "leave out --optim.clip",
        ),
        (["train", "--branch-from", "x", "--cooldown-steps", "3"], "neither a checkpoint"),
        (["generate", "nowhere", "--prompt", "x"], "neither a checkpoint"),
        (["convert", "nowhere", "out", "--to", "remote-code"], "neither a checkpoint"),
        (
            ["convert", "nowhere", "out", "--to", "remote-code", "--init", "lower"],
            "leave out --init",
        ),
        (["train", "--config", "nowhere.toml"], "nowhere.toml"),
        (["train", "--resume", "--out", "nowhere"], "no run to resume"),
        (["train", "--resume", "--out", "nowhere", "--seed", "9"], "leave out --seed"),
        (["train", "--data.path", "nowhere.txt", "--out", "never"], "not a file"),
    ],
)
def test_mistakes_end_in_one_line_and_no_traceback(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert (
        printed.err.startswith("error: ") and words in printed.err and printed.err.count("\n") == 1
    )
    assert not (tmp_path / "never").exists()


def test_the_overview_names_every_command_and_loads_nothing(capsys):
    main([])
    shown = capsys.readouterr().out
    main(["--help"])
    assert capsys.readouterr().out == shown
    assert all(f"  {name} " in shown for name in COMMANDS)
    main(["--version"])
    assert capsys.readouterr().out == f"mor {mor.__version__}\n"
    code = (
        "import sys; from mor.cli import main; main([]); main(['--version']); "
        "print(sorted({'torch', 'tyro', 'pydantic', 'rich', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_of_a_command_does_not_load_torch():
    code = """
import sys
from mor.cli import main
from mor.cli.main import COMMANDS
for name in COMMANDS:
    if name in ("bench", "serve"):  # their settings lie beside what measures and serves
        continue
    try:
        main([name, "--help"])
    except SystemExit as stopped:
        assert stopped.code in (0, None), name
    assert "torch" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(
        f"usage: mor {name}" in done.stdout for name in COMMANDS if name not in ("bench", "serve")
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "mor has no command 'trian' (did you mean 'train'?)"),
        (["--hepl"], "mor has no command '--hepl'"),
        (["costs", "--num-recursion", "2"], "--num-recursions"),
        (["train", "--stepps", "3"], "--steps"),
        (["report", "x", "--max-windows", "0"], "max_windows must be at least 1, got 0"),
        (["train", "--stepps", "3"], "error: --stepps is not known here (did you mean --steps?)"),
        (["train", "--settings.optim.lr", "3"], "error: --settings.optim.lr is not known here"),
        (["train", "--optim", "3"], "error: --optim is not known here"),
        (["train", "--steps", "1.5"], "error: --steps takes whole numbers, got '1.5'"),
        (["train", "--optim.betas", "1", "x"], "--optim.betas takes numbers, got '1', 'x'"),
        (["train", "--optim.warmup", "3"], "error: optim.warmup must be at most 1, got 3.0"),
        (["train", "--optim.name", "x"], "error: --optim.name is one of adamw, muon, not 'x'"),
        (["generate", "x", "--max-depth", "y"], "--max-depth takes whole numbers, got 'y'"),
        (["train", "--data.path"], "error: --data.path needs a value"),
        (["info"], "error: PATH is missing"),
        (["train", "--out", ""], "error: --out is empty"),
        (["train", "--out="], "error: --out is empty"),
        (["info", ""], "error: an argument is empty"),
        (["presets", "--recursions"], "recursions must be a list of at least 1, got a list of 0"),
        (["bench", "decode", "--batches"], "batches must be a list of at least 1, got a list of 0"),
        (["train", "--seed", "1", "--seed=2"], "error: --seed is given twice"),
        (["costs", "--json", "--no-json"], "error: --no-json is given twice"),
        (["sweep", "nowhere.toml"], "error: there is no nowhere.toml"),
        (["train", "--config", "."], "error: . is a folder, and a file is needed"),
        (["demo", "--out", "/dev/null"], "/dev/null is a file"),
    ],
)
def test_a_wrong_flag_or_value_is_one_plain_sentence(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and words in printed and printed.count("\n") == 1


def test_an_encoding_without_our_signs_ends_nothing(monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    main(["presets"])
    assert b"1+10x3+1" in printed.getvalue() and printed.getvalue().isascii()


@pytest.mark.parametrize("arguments", [["--help"], ["presets"], ["costs", "--json"]])
def test_a_closed_pipe_is_no_mistake(arguments, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)  # as `mor ... | head` after its last line
    with open(writer, "w") as closed, pytest.raises(SystemExit) as stopped:
        monkeypatch.setattr(sys, "stdout", closed)
        main(arguments)
    assert capsys.readouterr().err == "" and stopped.value.code == 1


def test_a_process_ends_as_its_command_does():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "mor", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == "" and done.returncode == 1


def test_ctrl_c_says_so(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mor.cli.presets.Presets.run", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["presets"])
    assert stopped.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_during_imports_is_no_traceback():
    code = """
import sys
class Stop:
    def find_spec(self, name, *_):
        if name == "mor.interruption":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stop())
import mor.cli
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")
