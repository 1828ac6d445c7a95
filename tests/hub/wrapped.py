"""A small model as transformers sees it."""

from mor.hub.modeling import MoRForCausalLM
from tests.conftest import tiny


def wrapped(model=None, **choices):
    return MoRForCausalLM.from_transformer(
        model or tiny("expert_choice", **choices), pad_token_id=0
    ).eval()
