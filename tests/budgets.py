"""Small models that know what depth budgets ask of their routers."""

import functools

import numpy as np

from mor.data.stream import Part, TokenData
from mor.data.text_bytes import TextBytes
from mor.evaluation.calibrate import calibrate
from mor.model.config import RouterConfig
from tests.conftest import ROUTERS, random_tokens, tiny

DEPTHS = [1.6, None, "full", 2.4, 4.3, 1]
"""One for each row of a batch."""


def text(tokens, *, seed=0):
    """So many random tokens."""
    ids = random_tokens(tokens, seed=seed)
    sizes = np.ones((2, 37), dtype=np.int64)
    return TokenData(
        [Part(ids.numpy(), np.array([tokens]))], 1, tokens, TextBytes(*sizes, sizes[1], 36)
    )


GAIN = RouterConfig(
    kind="expert_choice", causal_selection="gain", gate="residual", reads="direction"
)


@functools.cache
def calibrated(router="expert", kv_strategy="recursion_wise", **settings):
    """router: a name in ``ROUTERS``, "gain", or "deepened", which the model is, too. For budgets of
    up to 5 recursions, of which 3 are trained."""
    known = ROUTERS | {"gain": GAIN, "deepened": RouterConfig(kind="gain")}
    settings |= dict(deepened=True, lora_rank=3) if router == "deepened" else {}
    model = tiny(known[router], kv_strategy=kv_strategy, **settings)
    calibrate(model, text(600), seq_len=23, max_windows=12, deepest=5)
    return model
