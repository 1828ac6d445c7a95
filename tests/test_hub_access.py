"""Where the hub is silent, the libraries use their caches alone, and at once."""

import socket

import huggingface_hub
import pytest
from huggingface_hub import constants

from mor import hub_access
from mor.data.tokenizer import Tokenizer
from mor.hub_access import asking_the_hub


@pytest.fixture
def silent_hub(monkeypatch):
    """A hub that takes calls and says nothing; how often it was called."""
    calls = []
    real = huggingface_hub.get_session

    def session():
        calls.append(1)
        return real()

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "get_session", session)
        monkeypatch.setattr(hub_access, "PATIENCE_S", 0.05)
        forget = hub_access._answers.cache_clear
        forget()
        yield calls
    forget()


def test_a_name_that_a_silent_hub_may_have_is_looked_up_in_the_cache_alone(silent_hub):
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no/such: .*127.0.0.1:\d+ does not answer"):
            Tokenizer.find("no/such")
    assert len(silent_hub) == 1 and not constants.HF_HUB_OFFLINE


def test_what_is_here_asks_nobody(silent_hub, tmp_path):
    with pytest.raises(OSError, match="damaged"), asking_the_hub(str(tmp_path)):
        assert not constants.HF_HUB_OFFLINE
        raise OSError("damaged")
    assert silent_hub == []


def test_what_is_in_the_cache_is_read_although_the_hub_is_silent(silent_hub):
    with asking_the_hub("owner/name"):
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_asked_as_usual(silent_hub, monkeypatch):
    monkeypatch.setattr(hub_access, "_answers", lambda minute: True)
    with asking_the_hub("owner/name"):
        assert not constants.HF_HUB_OFFLINE
