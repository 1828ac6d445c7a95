"""Settings of the HTTP server."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mor.settings import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Settings

KEYS = "MOR_API_KEY"
"""The environment variable that holds keys, with white space between them."""


class ServerConfig(Settings):
    """Who may ask, how much, and for how long."""

    host: str = "127.0.0.1"
    """Address to listen on. The default is reached from this machine alone; 0.0.0.0 from all."""
    port: Annotated[int, Field(ge=0, lt=2**16)] = 8000
    """0 takes a free one."""
    model_name: str | None = None
    """What clients call the model. Default: the name of its folder, file or hub entry."""
    api_key: tuple[str, ...] = ()
    """Keys of which a client must send one, beside those in the environment variable MOR_API_KEY,
    which other users of the machine cannot read in the list of processes. None: everyone may
    ask."""
    allow_origin: tuple[str, ...] = ()
    """Web pages from these origins (such as https://example.org) may ask, or * for all."""
    max_waiting: NonNegativeInt = 64
    """Answers that wait for a slot of the engine; beyond, requests are refused with 429."""
    max_choices: PositiveInt = 128
    """Most answers that one request may ask for: prompts times n or best_of."""
    max_unread: PositiveInt = 512
    """Events that wait for a client that reads slowly; beyond, it is cut off."""
    max_body_bytes: PositiveInt = 1024**2
    """Longest request body; beyond, 413. All others wait while one is parsed."""
    max_header_bytes: PositiveInt = 64 * 1024
    """Longest head of a request, its path and headers; beyond, 431."""
    request_timeout_s: PositiveFloat = 300
    """Longest time for an answer."""
    read_timeout_s: PositiveFloat = 30
    """Longest time for a request's head to arrive, and for its body."""
    structure_timeout_s: PositiveFloat = 5
    """Longest time for compiling a JSON schema, regular expression or grammar."""
    write_timeout_s: PositiveFloat = 10
    """Longest time that a client may leave the next event unread."""
    drain_s: NonNegativeFloat = 30
    """How long answers may still take after SIGTERM or Ctrl-C, before they are ended."""

    def __post_init__(self) -> None:
        for name in ("api_key", "allow_origin"):
            if not all(value.strip() for value in getattr(self, name)):
                raise ValueError(f"{name} holds an empty text; leave it out")
        _check_keys(self.api_key)

    @property
    def keys(self) -> tuple[str, ...]:
        """Those given, and those of the environment. Raises ValueError for one that no client can
        send."""
        return (*self.api_key, *_check_keys(os.environ.get(KEYS, "").split()))

    @property
    def is_open(self) -> bool:
        """Whether others than this machine may reach it, and need no key."""
        return not self.keys and not _is_here(self.host)

    def url(self, port: int) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{port}"


def _check_keys(keys: Sequence[str]) -> Sequence[str]:
    for key in keys:
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError(
                "a key must be of visible ASCII characters, since it is sent in a header; change "
                f"key {keys.index(key) + 1} of those in --api-key or {KEYS}"
            )
    return keys


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
