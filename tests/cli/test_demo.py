"""mor demo: an interrupted one says what is left."""

import pytest

from mor.cli import main
from mor.demo import demo


def test_an_interrupted_demo_says_what_is_left(tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_text", interrupt)
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--quick", "--out", str(tmp_path / "demo")])
    assert stopped.value.code == 130
    assert "keeps what is trained so far" in capsys.readouterr().out
