"""The help shows the usual flags first."""

import pytest

from mor.cli import main
from mor.cli.flags import flags
from mor.cli.train import USUAL, Train


def test_help_for_training_shows_the_usual_flags_first_and_every_other_one(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 80 and max(map(len, shown.splitlines())) <= 80
    names = ["--" + each.name.replace("_", "-") for each in flags(Train())]
    assert [name for name in names if name not in shown.split()] == []
    usual = ["--" + name.replace("_", "-") for name in USUAL]
    explained = [line.split()[0] for line in shown.splitlines() if line.startswith("--")]
    assert explained == usual
    assert shown.index("Peak learning rate") < shown.index("--model.dim")
    assert "Peak learning rate. (0.003)" in shown and "expert_choice, token_choice" in shown
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    everything = capsys.readouterr().out
    assert all(name in everything for name in names)
