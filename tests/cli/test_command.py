"""Settings of a command come from a file and from flags; mistakes in either are named."""

import pytest

from mor.cli import main
from mor.cli.train import Train


def test_a_broken_config_file_is_a_readable_error(tmp_path, capsys):
    (tmp_path / "a.toml").write_text("stepps = 3\n")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(tmp_path / "a.toml")])
    assert "did you mean 'steps'" in capsys.readouterr().err


def test_a_config_file_is_named_with_what_is_wrong_in_it(tmp_path, capsys):
    for content, words in (
        ("steps = 3\nseed = = 4\n", "line 2"),
        ("[model.router]\nalpha = -1\n", "model.router.alpha must be greater than 0, got -1"),
        ("steps = true\n", "steps must be a whole number, got True"),
    ):
        (tmp_path / "a.toml").write_text(content)
        with pytest.raises(SystemExit):
            main(["train", "--config", str(tmp_path / "a.toml")])
        printed = capsys.readouterr().err
        assert f"{tmp_path / 'a.toml'}: " in printed and words in printed


def test_flags_win_over_the_model_of_a_file_also_where_they_are_the_defaults(tmp_path):
    (tmp_path / "a.toml").write_text("steps = 3\n[model]\ndim = 32\nnum_heads = 3\n")
    start = ["--config", str(tmp_path / "a.toml")]
    assert Train.read(start, "mor train").settings.model.dim == 32
    assert Train.read([*start, "--seed", "1"], "mor train").settings.model.dim == 32
    chosen = Train.read([*start, "--preset", "mini", "--steps", "4"], "mor train").settings
    assert chosen.model.dim == 192 and chosen.steps == 4
