"""A directory with its own code loads where mor is not installed."""

import os
import subprocess
import sys

import pytest
import torch

from mor import checkpoint
from mor.conversion.remote_code import export, modules
from mor.data.tokenizer import byte_tokenizer
from tests.conftest import random_tokens, tiny

WITHOUT_MOR = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mor":
            raise ImportError("mor is not installed on this machine")
sys.meta_path.insert(0, Hidden())
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = torch.load(sys.argv[2])
greedy = dict(max_new_tokens=7, do_sample=False, eos_token_id=None)
texts = [model.generate(tokens, use_cache=use_cache, **greedy) for use_cache in (True, False)]
assert torch.equal(*texts)
torch.save((model(tokens).logits.detach(), model(tokens).depths, texts[0]), sys.argv[3])
"""


@pytest.mark.parametrize("kv", [pytest.param("recursion_wise", marks=pytest.mark.slow), "hybrid"])
def test_an_export_needs_no_mor(kv, tmp_path):
    model, tokens = tiny("expert_choice", kv_strategy=kv, vocab_size=257), random_tokens(2, 9)
    checkpoint.save(tmp_path / "c", model, byte_tokenizer(), progress={"step": 1})
    export(tmp_path / "c", tmp_path / "out")
    assert not (tmp_path / "out" / "training_state").exists()
    assert not (tmp_path / "out" / "checksums.json").exists(), "config.json is another one now"
    torch.save(tokens, tmp_path / "tokens.pt")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            WITHOUT_MOR,
            tmp_path / "out",
            tmp_path / "tokens.pt",
            tmp_path / "found.pt",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logits, depths, _ = torch.load(tmp_path / "found.pt")
    expected = model(tokens)
    torch.testing.assert_close(logits, expected.logits_BTV)
    assert torch.equal(depths, expected.routing.depth_BT)
    again = checkpoint.load(tmp_path / "out")  # and mor still reads it
    assert torch.equal(again.model.embedding.weight, model.embedding.weight)


def test_an_export_takes_along_only_what_it_needs(tmp_path):
    names = [file.stem for file in modules()]
    assert len(set(names)) == len(names), "an export holds all of them in one folder"
    assert "transformer" in names and not {"loop", "cli", "checkpoint", "tokenizer"} & set(names)
    checkpoint.save(tmp_path / "c", tiny(vocab_size=257), byte_tokenizer())
    with pytest.raises(ValueError, match="exists; choose another"):
        export(tmp_path / "c", tmp_path)
    with pytest.raises(ValueError, match="neither a checkpoint"):
        export(tmp_path / "nothing", tmp_path / "out")
