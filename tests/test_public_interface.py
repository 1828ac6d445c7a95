"""What users may rely on: names at the top level, old module paths, files of older versions."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mor
from mor import checkpoint
from mor.training.config import load_config
from mor.training.loop import train

OLD_RUN = Path(__file__).parent / "fixtures" / "old_run"  # made by make_old_run.py beside it


def test_every_public_name_is_there_and_lazy():
    names = [name for name in mor.__all__ if getattr(mor, name) is None]
    assert not names
    with pytest.raises(AttributeError, match="no attribute 'transformer'"):
        _ = mor.transformer
    code = "import mor, sys; mor.__all__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("mor.config", "ModelConfig, RouterConfig, preset"),
        pytest.param("mor.generate", "SamplingParams, generate", marks=pytest.mark.slow),
        pytest.param("mor.hf", "MoRForCausalLM", marks=pytest.mark.slow),
    ],
)
def test_module_paths_of_the_first_version_still_import_and_warn(module, names):
    code = (
        f"import warnings; warnings.simplefilter('error', DeprecationWarning)\n"
        f"try:\n    from {module} import {names}\nexcept DeprecationWarning as w:\n    print(w)\n"
        f"warnings.simplefilter('ignore')\nfrom {module} import {names}\n"
        f"import mor; print(callable(mor.generate))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "is now mor." in done.stdout and done.stdout.endswith("True\n")


def test_a_checkpoint_of_the_first_version_predicts_what_it_did():
    expected = json.loads((OLD_RUN / "expected.json").read_text())
    _, model, tokenizer = mor.load(OLD_RUN)
    with torch.inference_mode():
        output = model(torch.tensor([tokenizer.encode("Line 7: the state")]))
    assert output.routing.depth_BT[0].tolist() == expected["depths"]
    logits = output.logits_BTV[0, -1, :8]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), atol=1e-5, rtol=0)


def test_a_run_of_the_first_version_goes_on_to_the_same_end(tmp_path, monkeypatch):
    expected = json.loads((OLD_RUN / "expected.json").read_text())
    shutil.copytree(OLD_RUN, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    config = load_config(Path("train.json"))
    assert config.model.router.gate == "paper" and config.model.kv_strategy == "recursion_wise"
    result = train(config, resume=True)
    weights = checkpoint.load(result.path).model.parameters()
    found = sum(float(p.detach().double().abs().sum()) for p in weights)
    assert found == pytest.approx(expected["weight_sum_after_6_steps"], rel=1e-6)
    rows = [json.loads(line) for line in Path("metrics.jsonl").read_text().splitlines()]
    nll = [row["validation_nll"] for row in rows if "validation_nll" in row]
    assert nll[-1] == pytest.approx(expected["validation_nll_after_6_steps"], rel=1e-5)
