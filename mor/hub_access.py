"""Asking the Hugging Face hub, without a wait of minutes where it cannot be reached."""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE_S = 5.0


@contextmanager
def asking_the_hub(name: str) -> Iterator[None]:
    """Around code that reads ``name``, which the hub may have, with transformers or datasets.

    They ask again and again for up to a minute. So where the hub does not answer within seconds,
    they are told to look into their caches alone. Raises ConnectionError if it is not there either.
    """
    from huggingface_hub import constants

    if Path(name).exists() or constants.HF_HUB_OFFLINE or _answers(int(time.monotonic() // 60)):
        yield
        return
    switches = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    try:
        for module in switches:
            module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        yield
    except OSError as error:
        raise ConnectionError(
            f"{name}: {str(error).strip().splitlines()[0]} ({constants.ENDPOINT} does not answer, "
            "so only files here and the hub's cache were searched; check name and network)"
        ) from error
    finally:
        for module in switches:
            module.HF_HUB_OFFLINE = False  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1)
def _answers(minute: int) -> bool:
    """Whether the hub answers at all; asked once a minute."""
    from huggingface_hub import constants, get_session

    answers: list[int] = []

    def ask() -> None:
        with suppress(Exception):
            answers.append(get_session().head(constants.ENDPOINT, timeout=PATIENCE_S).status_code)

    # In a thread, because looking up the host's name knows no timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE_S)
    return bool(answers)
