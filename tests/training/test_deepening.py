"""Training of a deepened model: what is frozen stays, gains are what they are said to be, and what
the source says is computed once."""

import dataclasses
import json
import shutil

import pytest
import torch

from mor import checkpoint
from mor.cli import main
from mor.conversion.convert import convert
from mor.conversion.deepen import Deepening
from mor.data.config import DataConfig
from mor.model.budget import even_table
from mor.model.config import RouterConfig
from mor.model.other_depths import ExploringRouter
from mor.model.routers import _worth_loss
from mor.model.routing import Exits
from mor.model.transformer import Transformer
from mor.run_folder import RunFolder
from mor.training.config import OptimConfig, TrainConfig, load_config
from mor.training.loop import checkpoint_bytes, train
from mor.training.optim import build_optimizers, freeze
from mor.training.step import with_capped
from tests.conftest import random_tokens, tiny
from tests.small_llama import save_llama
from tests.training.small_run import batch_of, metrics, quiet


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A deepened checkpoint."""
    folder = tmp_path_factory.mktemp("deepened")
    save_llama(folder / "llama")
    how = Deepening(
        block=(2, 5),
        num_recursions=2,
        router=RouterConfig(kind="gain", explore=0.5),
        kv_strategy="hybrid",
        lora_rank=4,
    )
    convert(str(folder / "llama"), folder / "start", deepening=how)
    return folder / "start"


def settings(start, out, **changes):
    values = dict(
        init_from=str(start),
        data=DataConfig(path="words:arithmetic?hops=2&held_out=1&modulus=3"),
        out=str(out),
        steps=6,
        batch_size=3,
        seq_len=90,
        eval_every=6,
        eval_windows=2,
        log_every=1,
    )
    return TrainConfig(**values | changes)


def weights(path):
    return checkpoint.load(path).model.state_dict()


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("trained", [None, "block", "all"])
def test_what_is_frozen_stays_and_the_rest_moves(trained, start, tmp_path):
    result = train(settings(start, tmp_path / "run", train=trained), console=quiet())
    before, after = weights(start), weights(result.path)
    moved = changed(before, after)
    added = {n for n in before if "lora" in n or "deepening" in n or "router.nets" in n}
    trunk = {n for n in before if "threshold" not in n} - added
    assert added <= moved
    assert (
        moved - added
        == {
            None: set(),
            "block": {n for n in trunk if n.startswith("recursions.")},
            "all": trunk,
        }[trained]
    )
    if trained is None:
        ids = random_tokens(2, 12)
        with torch.no_grad():
            kept, source = (
                checkpoint.load(path).model(ids, max_depth=1).logits_BTV
                for path in (result.path, start)
            )
        assert torch.equal(kept, source)
    written = json.loads((tmp_path / "run" / "train.json").read_text())
    assert written["model"]["deepened"] and written["model"]["dim"] == 30


def test_added_parts_train_at_any_number_of_recursions_and_at_exits(tmp_path):
    """Frozen trunk, its states from the cache, and more recursions than the model's own."""
    config = TrainConfig(
        model=tiny("fixed", deepened=True, lora_rank=3, max_seq_len=90).config,
        data=DataConfig(path="words:arithmetic?hops=1&held_out=0", tokenizer="bytes"),
        recursions_drawn=(2, 4),
        exit_share=0.5,
        exit_weight=0.3,
        source_cache=str(tmp_path / "cache"),
        out=str(tmp_path / "run"),
        steps=4,
        batch_size=2,
        seq_len=80,
        eval_every=4,
        eval_windows=2,
        log_every=1,
    )
    result = train(config, console=quiet())
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert {row["mean_depth"] for row in rows} == {2, 3, 4}
    assert all(row["exits"] > 0 and row["skipped"] == 0 for row in rows)
    model = Transformer(result.state.model.config).init_weights(config.seed)
    moved = changed(model.state_dict(), weights(result.path))
    assert moved == {
        name for name, p in model.named_parameters() if "lora" in name or "deep" in name
    }


def test_a_run_forgets_the_depths_of_the_weights_that_it_starts_from(start, tmp_path):
    path = tmp_path / "calibrated"
    shutil.copytree(start, path)
    checkpoint.write_depth_table(path, even_table(checkpoint.load(path).config, 4))
    assert checkpoint.load(path).model.depth_table is not None
    result = train(settings(path, tmp_path / "run", steps=1), console=quiet())
    assert checkpoint.load(result.path).model.depth_table is None


def test_steps_in_which_nothing_would_be_trained_are_refused():
    model = tiny("fixed", deepened=True).config
    with pytest.raises(ValueError, match="let it begin at 2"):
        TrainConfig(model=model, seq_len=8, recursions_drawn=(1, 4))
    TrainConfig(model=model, seq_len=8, recursions_drawn=(1, 4), train="block")


def test_optimizers_hold_nothing_that_is_frozen():
    model = tiny("gain", deepened=True, lora_rank=3)
    freeze(model, "added")
    optimizers = build_optimizers(model, TrainConfig().optim)
    held = sum(p.numel() for o in optimizers for g in o.param_groups for p in g["params"])
    added = [p for n, p in model.named_parameters() if p.requires_grad]
    assert held == sum(p.numel() for p in added) < sum(p.numel() for p in model.parameters())


def test_a_run_that_started_from_a_checkpoint_goes_on_to_the_same_end(start, tmp_path):
    whole = train(settings(start, tmp_path / "whole", train="added"), console=quiet())
    half = settings(start, tmp_path / "half", train="added", steps=6, save_every=3, keep=0)
    train(half, console=quiet())
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-00000006")
    rest = train(half, resume=True, console=quiet())
    assert not changed(weights(whole.path), weights(rest.path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(model=tiny("fixed").config), "brings its own model"),
        (dict(data=DataConfig(path="words:swaps", tokenizer="bytes")), "brings its own tokenizer"),
        (dict(seq_len=200), "exceeds model.max_seq_len=128"),
        (dict(init_from="nowhere"), "neither a checkpoint"),
        (dict(train="block", source_cache="cache"), "train='block' moves it"),
    ],
)
def test_conflicts_with_the_checkpoint_are_refused(changes, words, start, tmp_path):
    with pytest.raises(ValueError, match=words):
        train(settings(start, tmp_path / "run", **changes), console=quiet())
    assert not (tmp_path / "run" / "train.json").exists()


def test_only_models_with_added_parts_train_these():
    with pytest.raises(ValueError, match="this one has none"):
        TrainConfig(train="added")
    assert TrainConfig().trained == "all"


def test_the_command_takes_the_model_of_the_checkpoint(start, tmp_path, capsys):
    out, path = tmp_path / "run", "words:arithmetic?hops=1&held_out=0"
    arguments = ["train", "--init-from", str(start), "--data.path", path, "--out", str(out)]
    short = ["--steps", "1", "--batch-size", "1", "--seq-len", "80", "--eval-windows", "1"]
    for others, words in (
        (["--preset", "tiny"], "leave out --preset"),
        (["--model.dim", "8"], "leave out --model.dim"),
        (["--data.tokenizer", "bytes"], "leave out data.tokenizer"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, *short, *others])
        assert words in capsys.readouterr().err
    main([*arguments, *short])
    assert "2+3x2+3" in capsys.readouterr().out
    main(["train", "--resume", "--out", str(out), "--steps", "2"])
    assert metrics(out)[-1]["step"] == 2


def test_exits_are_losses_at_capped_depths():
    model = tiny("gain", deepened=True, lora_rank=3).requires_grad_(False)
    batch = batch_of(model)
    inputs = dict(targets_BT=batch.targets_BT, router=ExploringRouter(model.router, 0.7, 1))
    output = model(batch.tokens_BT, **inputs)
    exits = with_capped(model, batch, output, inputs).exits
    assert output.routing.depth.max() == 3
    by_cap = []
    for depth in (1, 2, 3):
        logits_BTV = model(batch.tokens_BT, router=inputs["router"], max_depth=depth).logits_BTV
        nll = torch.nn.functional.cross_entropy(
            logits_BTV.transpose(1, 2), batch.targets_BT, reduction="none"
        )
        by_cap.append(nll.flatten())
    asked = batch.targets_BT.flatten() != -100
    assert exits.index.tolist() == asked.nonzero().squeeze(1).tolist()
    torch.testing.assert_close(exits.nll_RK, torch.stack(by_cap)[:, asked])
    known = with_capped(model, batch, output, inputs, by_cap[0] + 1).exits
    torch.testing.assert_close(known.nll_RK[0], exits.nll_RK[0] + 1)
    torch.testing.assert_close(known.nll_RK[1:], exits.nll_RK[1:])


def test_worth_is_the_share_of_gain_and_weighs_by_distance():
    gain = torch.tensor([5.0, 4.0, 0.95, 0.05, 0.0, -1.0])
    logit = torch.zeros(6, requires_grad=True)
    _worth_loss(logit, gain).backward()
    # 5 + 4 + 0.95 are 99.5% of all gain, so 0.95 is the cutoff; the others are not worth it.
    assert (logit.grad[:3] < 0).all() and (logit.grad[3:] > 0).all()
    assert logit.grad[0] == logit.grad[1] and abs(logit.grad[2]) < 1e-5
    assert abs(logit.grad.sum()) < 1e-6, "both answers count the same"
    assert logit.grad[5] > logit.grad[3]
    nothing = torch.tensor([0.0, -1.0])
    assert _worth_loss(torch.zeros(2), nothing) == 0
    assert _worth_loss(torch.zeros(0), torch.zeros(0)) == 0


def test_the_router_learns_which_tokens_gain():
    """Tokens of one half of the vocabulary gain, the others lose."""
    model = tiny("gain", kv_strategy="hybrid")
    router, ids = model.router, random_tokens(4, 40)
    freeze(model, "added")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    gains = torch.where(ids.flatten() < 18, 0.3, -0.3)
    asked = torch.arange(3, ids.numel())
    exits = Exits(asked, torch.stack([0 * gains, -gains, -2 * gains])[:, asked])
    for step in range(60):
        routing = model(ids, router=ExploringRouter(router, 0.5, step)).routing
        loss = router.losses(dataclasses.replace(routing, exits=exits))["gain"]
        loss.value.backward()
        optimizer.step()
        optimizer.zero_grad()
    deeper = model(ids).routing.selected(1)
    assert (deeper == (gains > 0)).float().mean() > 0.9
    assert loss.weight == 0.1


def test_exploring_sends_the_share_on():
    model = tiny("gain")
    ids = random_tokens(8, 60)
    with torch.no_grad():
        own = model(ids).routing.selected(1)
        for seed in (0, 1):
            router = ExploringRouter(model.router, 0.25, seed)
            sent = model(ids, router=router).routing.selected(1)
            assert (own <= sent).all()
            assert 0.15 < float(sent[~own].float().mean()) < 0.35
    everyone = ExploringRouter(model.router, 1.0, 0)
    assert model(ids, router=everyone).routing.depth.min() == 3


def test_training_from_the_cache_is_the_same_training(start, tmp_path):
    plain = settings(start, tmp_path / "plain", optim=OptimConfig(lr=0.02))
    train(plain, console=quiet())
    cached = dataclasses.replace(
        plain, out=str(tmp_path / "cached"), source_cache=str(tmp_path / "cache")
    )
    train(cached, console=quiet())
    steps = [
        [row for row in metrics(tmp_path / name) if "loss" in row] for name in ("plain", "cached")
    ]
    for a, b in zip(*steps, strict=True):
        for name in ("loss", "gain", "mean_depth"):
            assert a[name] == pytest.approx(b[name], rel=0.02, abs=0.02)
    assert steps[0][-1]["gain"] > 0


def test_a_run_goes_on_with_another_cache_or_without_one(start, tmp_path, capsys):
    config = settings(start, tmp_path / "run", train="added", source_cache=str(tmp_path / "a"))
    train(config, console=quiet())
    resume = ["train", "--resume", "--out", config.out, "--steps"]
    main([*resume, "8", "--source-cache", str(tmp_path / "b")])
    assert (tmp_path / "b" / "source.sqlite").is_file()
    main([*resume, "9", "--source-cache", "None"])
    assert "source_cache was" in capsys.readouterr().out
    main([*resume, "10", "--source-cache", str(tmp_path / "a")])
    assert metrics(tmp_path / "run")[-1]["step"] == 10


def test_a_run_planned_by_flops_keeps_its_cache_or_says_in_steps_how_long_it_is(start, tmp_path):
    steps = dict(steps=TrainConfig().steps, flops=5e8)
    cache = dict(train="added", source_cache=str(tmp_path / "a"))
    done = train(settings(start, tmp_path / "run", **steps, **cache), console=quiet()).state.step
    resume = ["train", "--resume", "--out", str(tmp_path / "run"), "--source-cache", "None"]
    with pytest.raises(SystemExit) as stopped:
        main(resume)
    assert stopped.value.code == 2
    main([*resume, "--steps", str(done)])


def test_a_checkpoint_is_as_large_as_it_was_thought_to_be(start, tmp_path):
    result = train(settings(start, tmp_path / "run"), console=quiet())
    config = load_config(RunFolder(tmp_path / "run").settings)
    states = [
        s for o in result.state.optimizers for each in o.state.values() for s in each.values()
    ]
    held = [*result.state.model.parameters(), *states]
    assert checkpoint_bytes(config) == pytest.approx(sum(x.nbytes for x in held), rel=0.01)
    assert checkpoint_bytes(dataclasses.replace(config, train="all")) > 2 * checkpoint_bytes(config)
