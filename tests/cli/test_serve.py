"""mor serve: what it reads, what it calls the model, what it passes on."""

import pytest

from mor import checkpoint
from mor.cli import main
from mor.cli.serve import Serve
from mor.engine import EngineConfig
from mor.server import run as module
from tests.small_llama import save_llama


@pytest.fixture
def served(monkeypatch):
    """What would be served: the service, and what its engine is made of."""
    found = []

    def run(service, say):
        found.append((service, service._make()))
        say("http://here")

    monkeypatch.setattr(module, "run", run)
    return found


def test_a_run_is_served_under_its_name_with_the_settings_given(run, served, capsys):
    folder = run / "run"
    flags = ["--max-waiting", "5", "--max-num-seqs", "3", "--api-key", "a", "b"]
    main(["serve", str(folder), *flags, "--kv-cache-memory", "100000"])
    service, made = served[0]
    assert capsys.readouterr().out == "run: http://here/v1 (page: http://here/)\n"
    assert service.config.max_waiting == 5 and service.config.keys[:2] == ("a", "b")
    assert made.engine.config == EngineConfig(max_num_seqs=3, kv_cache_memory=100000)
    want, found = checkpoint.load(folder).model.state_dict(), made.engine.model.state_dict()
    assert all((want[name] == found[name]).all() for name in want)
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    main(["serve", str(newest)])
    main(["serve", str(folder), "--model-name", "mine"])
    assert [service.model_name for service, _ in served] == ["run", "run", "mine"]


def test_a_llama_directory_is_converted_in_memory(tmp_path, served):
    main(["serve", str(save_llama(tmp_path / "llama")), "--max-len", "64"])
    service, made = served[0]
    assert service.model_name == "llama" and made.chat is not None
    assert made.engine.model.config.num_recursions == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "llama"]


def test_a_template_comes_from_a_file(run, tmp_path, served):
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    main(["serve", str(run / "run"), "--chat-template", str(tmp_path / "chat.jinja")])
    assert served[0][1].chat is not None


def test_a_server_that_others_reach_without_a_key_is_warned_of(run, served, capsys, monkeypatch):
    monkeypatch.delenv("MOR_API_KEY", raising=False)
    main(["serve", str(run / "run"), "--host", "0.0.0.0"])
    assert "everyone who reaches 0.0.0.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nowhere/at/all/x"], "does not exist"),
        (["--port", "70000"], "port must be less than 65536"),
        (["--chat-template", "nowhere.jinja"], "there is no nowhere.jinja"),
        (["--no-such-flag"], "not known here"),
    ],
)
def test_mistakes_are_one_line(run, flags, words, capsys):
    source = [] if "/" in flags[0] else [str(run / "run")]
    with pytest.raises(SystemExit, match="2"):
        main(["serve", *source, *flags])
    said = capsys.readouterr().err.strip().splitlines()
    assert words in said[-1] and said[-1].startswith("error: ")


def test_the_command_has_flags_for_server_and_engine_without_prefixes():
    command = Serve.read(["x", "--max-unread", "7", "--batching", "static"], "mor serve")
    assert command.server.max_unread == 7 and command.engine.batching == "static"
