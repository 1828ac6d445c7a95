"""Configurations under transformers' Auto classes."""

import subprocess
import sys

import pytest

from mor.hub.modeling import MoRConfig
from mor.model.config import PRESET_NAMES, preset
from tests.hub.wrapped import wrapped

# Configuration and checkpoints


def test_every_preset_makes_a_config_with_the_names_of_both_worlds():
    for name in PRESET_NAMES:
        for router, recursions in [
            ("fixed", 1),
            ("fixed", 3),
            ("expert_choice", 3),
            ("token_choice", 2),
        ]:
            config = MoRConfig.from_preset(name, num_recursions=recursions, router=router)
            ours = preset(name, num_recursions=recursions, router=router)
            assert config.to_model_config() == ours
            assert config.hidden_size == ours.dim and config.num_hidden_layers == ours.num_layers
            assert (
                config.num_key_value_heads == ours.num_kv_heads
                and config.vocab_size == ours.vocab_size
            )
    assert MoRConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2).dim == 64


def test_mistakes_in_a_config_are_named():
    with pytest.raises(ValueError, match="did you mean 'num_recursions'"):
        MoRConfig(num_recursion=3)
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        MoRConfig(num_heads=4, num_kv_heads=3)
    with pytest.raises(ValueError, match="did you mean 'expert_choice'"):
        MoRConfig.from_preset("tiny", num_recursions=3, router={"kind": "expert_choise"})


ORDERS = [
    "import mor.hub; from transformers import AutoConfig as A",
    "from transformers import AutoModelForCausalLM as A; import mor.hub",
    "import mor.hub; import peft; from transformers import AutoModelForCausalLM as A",
]
MORE_ORDERS = [
    "import mor.hub.modeling; from transformers import AutoModelForCausalLM as A",
    "import mor.hub; from transformers import AutoTokenizer, AutoConfig as A",
    "import mor.hub; from transformers import Trainer, AutoModelForCausalLM as A",
    "from transformers import TrainingArguments, AutoModelForCausalLM as A; import mor.hub",
    "import mor.hf; from transformers import AutoModelForCausalLM as A",
]
# Each order in a process of its own, which starts with the large packages that both build upon.
EACH = """
import contextlib, os, sys
import accelerate, torch._dynamo
with contextlib.suppress(ImportError):
    import sklearn
assert not {"mor", "peft", "transformers"} & set(sys.modules)
folder, *orders = sys.argv[1:]
for order in orders:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, order
    else:
        exec(order)
        print(type(A.from_pretrained(folder)).__name__, flush=True)
        os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("orders", [ORDERS, MORE_ORDERS])
def test_auto_classes_know_mor_in_every_order_of_imports(orders, tmp_path):
    wrapped().save_pretrained(tmp_path)
    found = subprocess.run(
        [sys.executable, "-c", EACH, str(tmp_path), *orders], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    wanted = ["MoRConfig" if "AutoConfig" in o else "MoRForCausalLM" for o in orders]
    assert found.stdout.split() == wanted
