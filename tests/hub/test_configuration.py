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


@pytest.mark.parametrize(
    "code",
    [
        "import mor.hub; from transformers import AutoConfig as A",
        "from transformers import AutoModelForCausalLM as A; import mor.hub",
        "import mor.hub.modeling; from transformers import AutoModelForCausalLM as A",
        "import mor.hub; from transformers import AutoTokenizer, AutoConfig as A",
        "import mor.hub; from transformers import Trainer, AutoModelForCausalLM as A",
        "from transformers import TrainingArguments, AutoModelForCausalLM as A; import mor.hub",
        "import mor.hub; import peft; from transformers import AutoModelForCausalLM as A",
        "import mor.hf; from transformers import AutoModelForCausalLM as A",
    ],
)
def test_auto_classes_know_mor_in_every_order_of_imports(code, tmp_path):
    wrapped().save_pretrained(tmp_path)
    done = f"{code}; print(type(A.from_pretrained({str(tmp_path)!r})).__name__)"
    found = subprocess.run([sys.executable, "-c", done], capture_output=True, text=True, check=True)
    assert found.stdout.strip() in ("MoRConfig", "MoRForCausalLM")
