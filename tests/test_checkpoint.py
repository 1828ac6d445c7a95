"""Checkpoints: whole or not at all, bit for bit, and damage is named."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mor import checkpoint
from mor.cli import main
from mor.conversion.convert import convert
from mor.data.tokenizer import byte_tokenizer
from mor.files import remove_folder
from mor.run_folder import RunFolder
from mor.training.loop import train
from tests.conftest import random_tokens, tiny
from tests.hub.wrapped import wrapped
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
    with pytest.raises(ValueError, match=r"config\.json is damaged.*on purpose, delete checksums"):
        checkpoint.load(tmp_path / "run")
    (result.path / "checksums.json").unlink()
    with pytest.raises(ValueError, match=r"of another shape: .*should be \(8, "):
        checkpoint.load(tmp_path / "run")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with a part for training."""
    model = tiny("expert_choice", vocab_size=257)
    path = tmp_path_factory.mktemp("saved") / "c"
    return checkpoint.save(path, model, byte_tokenizer(), progress={"step": 1})


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "c"))


def flip(file):
    whole = file.read_bytes()
    file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])


@pytest.mark.parametrize(
    "command",
    [
        "generate {} --prompt a",
        "eval {} --data {}",
        "eval {} --tasks piqa",
        "explain {} --text a",
        "convert {} {}/out",
        "convert {} {}/out --to llama",
        "convert {} {}/out --to remote-code",
    ],
)
def test_no_command_uses_a_checkpoint_that_has_changed(command, copied, capsys):
    flip(copied / "model.safetensors")
    with pytest.raises(SystemExit):
        main(command.replace("{}", str(copied)).split())
    assert "model.safetensors is damaged: its checksum has changed" in capsys.readouterr().err
    assert not (copied / "out").exists()


def test_what_is_read_is_verified_and_what_is_not_read_is_left_to_its_reader(copied):
    flip(copied / "training_state" / "progress.json")
    checkpoint.load(copied)
    with pytest.raises(ValueError, match=r"progress\.json is damaged"):
        checkpoint.load_progress(copied)
    flip(copied / "tokenizer.json")
    checkpoint.read_config(copied)
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        checkpoint.load(copied)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
def test_what_is_read_is_listed(name, copied):
    (copied / "README.md").touch()
    (copied / ".gitattributes").touch()
    checkpoint.load(copied)
    checkpoint.check_to_continue(copied)
    file = copied / "checksums.json"
    sums = json.loads(file.read_text())
    del sums[name]
    flip(copied / name)
    for left in (sums, {}):
        file.write_text(json.dumps(left))
        with pytest.raises(ValueError, match=" has no checksum in "):
            checkpoint.load(copied)


def test_what_a_run_goes_on_from_is_listed(copied):
    file = copied / "checksums.json"
    sums = json.loads(file.read_text())
    del sums["training_state/progress.json"]
    file.write_text(json.dumps(sums))
    checkpoint.load(copied)
    for read in (checkpoint.check_to_continue, checkpoint.load_progress):
        with pytest.raises(ValueError, match=r"progress\.json has no checksum"):
            read(copied)


def rewrite(folder, *, state=None, **settings):
    """Change a checkpoint as its owner would: without the checksums."""
    (folder / "checksums.json").unlink(missing_ok=True)
    values = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(values))
    if state is not None:
        save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"vocab_size": 10**12}, r"embedding\.weight is \(257, 24\), should be \(10{12}, 24\)"),
        ({"vocab_size": 10**18, "dim": 10**9}, "no memory holds a model of dim=1,000,000,000"),
        ({"shared_layers": 10**9}, "shared_layers must be at most 10000"),
        ({"num_recursions": 10**12}, "num_recursions must be at most 10000"),
        ({"shared_layers": 3}, r"missing: recursions\.shared_blocks\.2\.attention_norm\.weight"),
        ({"coda_layers": 0}, r"left over: model\.coda\.0"),
        ({"tie_embeddings": False}, r"no head\.weight, though the settings"),
        ({"num_heads": 2}, r"q_proj\.weight is \(24, 24\), should be \(12, 24\)"),
        ({"router": {"kind": "fixed"}}, r"left over: model\.recursions\.router"),
        ({"dim": "wide"}, r"config\.json: dim must be a whole number"),
        ({"dmi": 3}, r"config\.json: dmi: not a setting"),
    ],
)
def test_settings_that_are_not_those_of_the_weights_are_found_first(settings, words, copied):
    rewrite(copied, **settings)
    with pytest.raises(ValueError, match=words):
        checkpoint.load(copied)


@pytest.mark.parametrize("text", ["[1, 2]", "{", "", "[" * 100_000, "{}", '"mor"'])
def test_a_damaged_config_is_named(text, copied, tmp_path):
    (copied / "checksums.json").unlink()
    (copied / "config.json").write_text(text)
    for read in (checkpoint.load, lambda path: convert(str(path), tmp_path / "out")):
        with pytest.raises(
            ValueError, match=r"c/config\.json( is damaged| does not|: it names no)"
        ):
            read(copied)
    assert not (tmp_path / "out").exists()


def test_transformers_names_of_settings_are_ours_too(copied):
    values = json.loads((copied / "config.json").read_text())
    del values["norm_eps"]
    (copied / "checksums.json").unlink()
    theirs = {"transformers_version": "5", "rms_norm_eps": 0.25, "dtype": "float32"}
    (copied / "config.json").write_text(json.dumps(values | theirs))
    assert checkpoint.load(copied).config.norm_eps == 0.25
    rewrite(copied, norm_eps=0.5)
    with pytest.raises(ValueError, match="norm_eps is given twice"):
        checkpoint.load(copied)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(value, copied, tmp_path):
    model = checkpoint.load(copied).model
    with torch.no_grad():
        model.final_norm.weight[1] = value
    with pytest.raises(ValueError, match=r"final_norm\.weight in the model to save has 1 values"):
        checkpoint.save(tmp_path / "new", model, byte_tokenizer())
    assert not (tmp_path / "new").exists()
    rewrite(copied, state={f"model.{name}": t for name, t in model.state_dict().items()})
    with pytest.raises(ValueError, match=r"final_norm\.weight in .*c/model\.safetensors has 1 val"):
        checkpoint.load(copied)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.model.", "base_model.model."])
def test_names_may_have_what_wrappers_put_before_them(prefix, copied):
    model = checkpoint.load(copied).model
    rewrite(copied, state={prefix + name: t for name, t in model.state_dict().items()})
    again = checkpoint.load(copied).model.state_dict()
    assert all(torch.equal(again[name], t) for name, t in model.state_dict().items())


def test_a_copy_of_the_embedding_is_left_out_and_another_head_is_not(copied):
    model = checkpoint.load(copied).model
    state = model.state_dict()
    rewrite(copied, state=state | {"head.weight": state["embedding.weight"].clone()})
    again = checkpoint.load(copied).model.state_dict()
    assert all(torch.equal(again[name], t) for name, t in state.items())
    rewrite(copied, state=state | {"head.weight": state["embedding.weight"] + 1})
    with pytest.raises(ValueError, match=r"head\.weight that differs from the embedding"):
        checkpoint.load(copied)


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path):
    model = tiny(vocab_size=257)
    state = {f"_orig_mod.{name}": t for name, t in model.state_dict().items()}
    checkpoint.write(tmp_path / "c", model.config, state, byte_tokenizer())
    again = checkpoint.load(tmp_path / "c").model.state_dict()
    assert all(torch.equal(again[name], t) for name, t in model.state_dict().items())
    del state["_orig_mod.final_norm.weight"]
    with pytest.raises(ValueError, match=r"missing: final_norm\.weight"):
        checkpoint.write(tmp_path / "d", model.config, state, byte_tokenizer())
    assert not (tmp_path / "d").exists()


def test_a_tokenizer_larger_than_the_embedding_is_refused_both_ways(copied, tmp_path):
    with pytest.raises(ValueError, match=r"ids up to 256, the model embeddings for 0\.\.36"):
        checkpoint.save(tmp_path / "new", tiny(), byte_tokenizer())
    larger = byte_tokenizer()
    larger.backend.add_tokens(["one more"])
    larger.save(copied)
    (copied / "checksums.json").unlink()
    for read in (checkpoint.load, lambda path: convert(str(path), tmp_path / "out")):
        with pytest.raises(ValueError, match=r"c: the tokenizer has ids up to 257"):
            read(copied)
    assert not (tmp_path / "out").exists()


def test_several_files_of_weights_are_read_as_one(tmp_path):
    model = wrapped(vocab_size=257)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    byte_tokenizer().save(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = checkpoint.load(tmp_path).model.state_dict()
    assert all(torch.equal(again[name], t) for name, t in model.model.state_dict().items())


def test_loading_what_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(ValueError, match="neither a checkpoint"):
        checkpoint.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="its model_type is 'llama', not 'mor'"):
        checkpoint.load(tmp_path)


def test_a_table_of_depths_goes_where_the_weights_go(tmp_path):
    """Saved and loaded by us and by transformers, put in later, and refused when damaged."""
    from mor.hub import MoRForCausalLM
    from mor.model.budget import router_for
    from tests.budgets import calibrated

    model, tokenizer = calibrated("expert", vocab_size=257), byte_tokenizer()
    ours = checkpoint.save(tmp_path / "ours", model, tokenizer)
    theirs = tmp_path / "theirs"
    MoRForCausalLM.from_pretrained(ours).save_pretrained(theirs)
    tokenizer.save(theirs)
    tokens = random_tokens(2, 9)
    want = model(tokens, router=router_for(model, 2.4)).logits_BTV
    for folder in (ours, theirs):
        loaded = checkpoint.load(folder).model
        assert loaded.depth_table == model.depth_table
        assert torch.equal(loaded(tokens, router=router_for(loaded, 2.4)).logits_BTV, want)
        again = MoRForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(again(tokens, depth=2.4).logits, want)

    other = dataclasses.replace(model.depth_table, checked=(), spent={})
    for folder in (ours, theirs):
        assert checkpoint.write_depth_table(folder, other) == folder
        assert checkpoint.load(folder).model.depth_table == other
    config = json.loads((theirs / "config.json").read_text())
    config["depth_table"]["budgets"] = [1.0]
    (theirs / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: depth_table is damaged"):
        checkpoint.load(theirs)
