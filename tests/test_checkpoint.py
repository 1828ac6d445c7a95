"""Checkpoints: whole or not at all, bit for bit, and damage is named."""

import json

import pytest
import torch

from mor import checkpoint
from mor.files import remove_folder
from mor.run_folder import RunFolder
from mor.training.loop import train
from tests.training.small_run import quiet, settings


def test_checkpoints_round_trip_bit_for_bit_and_hold_no_tied_copy(squares, tmp_path):
    result = train(settings(squares, tmp_path / "run", steps=3), console=quiet())
    loaded = checkpoint.load(tmp_path / "run")
    assert loaded.config == result.state.model.config
    state = result.state.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in loaded.model.state_dict().items())
    assert loaded.tokenizer.encode("square") == result.corpus.tokenizer.encode("square")
    assert json.loads((result.path / "config.json").read_text())["model_type"] == "mor"
    assert "head.weight" not in state


def test_a_failed_save_leaves_the_old_checkpoint_and_no_debris(squares, tmp_path, monkeypatch):
    result = train(settings(squares, tmp_path / "run", steps=3), console=quiet())
    before = (result.path / "model.safetensors").read_bytes()
    monkeypatch.setattr(
        checkpoint, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(result.path, result.state.model, result.corpus.tokenizer)
    assert (result.path / "model.safetensors").read_bytes() == before
    assert [p.name for p in result.path.parent.iterdir()] == [result.path.name]


def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(squares, tmp_path):
    config = settings(squares, tmp_path / "run", save_every=4, keep=0)
    train(config, console=quiet())
    newest = RunFolder(tmp_path / "run").checkpoint(12)
    for name in ("model.safetensors", "training_state/optimizer/__0_0.distcp"):
        file = newest / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
        with pytest.raises(
            ValueError,
            match=rf"{name} is damaged.*step-00000008 is intact.*rm -r .*step-00000012\)",
        ):
            train(config, resume=True, console=quiet())
        file.write_bytes(whole)
    (newest / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer.json is missing"):
        train(config, resume=True, console=quiet())
    remove_folder(newest)
    assert train(config, resume=True, console=quiet()).finished


def test_a_damaged_or_foreign_weight_file_is_named(squares, tmp_path):
    result = train(settings(squares, tmp_path / "run", steps=1), console=quiet())
    weights = result.path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        checkpoint.load(tmp_path / "run")
    weights.write_bytes(whole)
    config = json.loads((result.path / "config.json").read_text())
    (result.path / "config.json").write_text(json.dumps(config | {"ffn_dim": 8}))
    with pytest.raises(ValueError, match="belongs to another config"):
        checkpoint.load(tmp_path / "run")


def test_loading_what_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(ValueError, match="neither a checkpoint"):
        checkpoint.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="not describe a mor model"):
        checkpoint.load(tmp_path)
