"""Every configuration that comes with mor can be built: the demo's, presets, files, studies."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from mor import checkpoint
from mor.cli.train import Train, with_vocabulary
from mor.data.corpus import load_corpus
from mor.data.sources import Document
from mor.data.tokenizer import byte_tokenizer
from mor.demo import experiment
from mor.demo.task import task_experiment
from mor.demo.text import text_experiment
from mor.model.config import PRESET_NAMES
from mor.model.transformer import Transformer
from mor.studies.launch import flops_of
from mor.studies.study import load_study, main_runs, study_rows, tuning_runs
from mor.training.config import total_steps
from tests.conftest import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def check(config):
    """Build its model without memory, and count its steps."""
    with torch.device("meta"):
        Transformer(config.model)
    assert total_steps(config) > 0


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("make", [text_experiment, task_experiment])
def test_the_demo_trains_what_it_configures(make, quick, monkeypatch, tmp_path):
    documents = [Document(f"topic {i}", f"Text {i} of some words. " * 4) for i in range(60)]
    # All of Python's take a while.
    monkeypatch.setattr("mor.data.corpus.python_documents", lambda: documents)
    found = make(1e11, quick=quick)
    corpus = load_corpus(found.data)

    def train(config, **_):
        check(config)
        return SimpleNamespace(finished=False)  # as if it was interrupted

    monkeypatch.setattr(experiment, "train", train)
    for name in found.models:
        with pytest.raises(KeyboardInterrupt):
            experiment.train_one(found, name, corpus, tmp_path, seed=0, console=Console())


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            ["--config", str(path)]
            for path in sorted((ROOT / "configs").rglob("*.toml"))
            if "init_from" not in path.read_text()  # those need their checkpoint: see below
        ),
        *(
            ["--preset", name, "--num-recursions", "3", "--recipe", "paper"]
            for name in PRESET_NAMES
        ),
        *(["--preset", name, "--num-recursions", "3"] for name in PRESET_NAMES),
        *(["--preset", name] for name in PRESET_NAMES),
        [],
    ],
    ids=" ".join,
)
def test_files_and_presets_are_read_without_a_word(arguments):
    check(with_vocabulary(Train.read(arguments, "mor train").settings))


@pytest.mark.parametrize("name", ["deepen", "deepen-text"])
def test_the_files_for_deepened_models_are_read_without_a_word(name, tmp_path):
    model = tiny("gain", deepened=True, lora_rank=2, vocab_size=257)
    checkpoint.save(tmp_path, model, byte_tokenizer())
    given = ["--config", str(ROOT / f"configs/{name}.toml"), "--init-from", str(tmp_path)]
    check(Train.read(given, "mor train").settings)


FILES = sorted((ROOT / "studies").glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_run_of_a_study_is_made(path, tmp_path):
    study = load_study(path)
    for row in study_rows(study):
        check(row.config)
    rates = {row.name: 1e-3 for row in study_rows(study)}
    stages = [tuning_runs(study, tmp_path), *main_runs(study, tmp_path, rates)]
    runs = [run for stage in stages for run in stage]
    assert runs and all(total_steps(run.config) > 0 for run in runs)
    for run in {run.row: run for run in runs if run.config.flops and not run.branch_step}.values():
        assert flops_of(run) == pytest.approx(run.config.flops, rel=0.01)
