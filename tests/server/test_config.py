"""Settings of the server."""

import pytest

from mor.server.config import ServerConfig


def test_keys_are_those_given_and_those_of_the_environment(monkeypatch):
    monkeypatch.setenv("MOR_API_KEY", "b  c")
    assert ServerConfig(api_key=("a",)).keys == ("a", "b", "c")
    monkeypatch.delenv("MOR_API_KEY")
    assert ServerConfig().keys == ()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "::"}, True),
        ({"host": "::1"}, False),
        ({"host": "localhost"}, False),
        ({"host": "my.machine"}, True),
        ({"host": "0.0.0.0", "api_key": ("a",)}, False),
    ],
)
def test_a_server_is_open_if_others_reach_it_without_a_key(settings, expected, monkeypatch):
    monkeypatch.delenv("MOR_API_KEY", raising=False)
    assert ServerConfig(**settings).is_open == expected


def test_wrong_settings_are_refused_and_addresses_are_urls():
    with pytest.raises(ValueError, match="port must be less than 65536"):
        ServerConfig(port=70000)
    with pytest.raises(ValueError, match="api_key holds an empty text"):
        ServerConfig(api_key=("",))
    assert ServerConfig(host="::1").url(80) == "http://[::1]:80"
