"""Training end to end on a small corpus: learns, resumes bit for bit, says what is wrong."""

import dataclasses
import io
import json
import math
import resource
import signal

import pytest
import torch
from conftest import random_tokens, tiny
from filelock import FileLock
from rich.console import Console

from mor import checkpoint
from mor.data.stream import DataConfig
from mor.evaluation.nll import evaluate
from mor.files import remove_folder
from mor.model.config import RouterConfig, preset
from mor.run_folder import RunFolder
from mor.training import sharded_state
from mor.training.config import TrainConfig, branch, capacities_at, load_config, total_steps
from mor.training.loop import TrainingError, collapse_message, train
from mor.training.optim import OptimConfig, learning_rate

LOSS_FREE = RouterConfig(kind="token_choice", balancing="loss_free")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    rows = [{"text": f"The square of {i} is {i * i}. " * 6} for i in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(path), tokenizer="bpe", vocab_size=300)


def settings(data, out, router="expert_choice", **overrides):
    recursions = 1 if router == "fixed" else 2
    values = dict(
        model=preset(
            "tiny", num_recursions=recursions, router=router, num_layers=4, max_seq_len=64
        ),
        data=data,
        out=str(out),
        steps=12,
        batch_size=4,
        seq_len=32,
        eval_every=6,
        log_every=3,
    )
    return TrainConfig(**(values | overrides))


def quiet():
    return Console(file=io.StringIO())


def metrics(out):
    return [json.loads(line) for line in RunFolder(out).metrics.read_text().splitlines()]


@pytest.mark.parametrize(
    "router", ["fixed", "expert_choice", "token_choice", "random", "position", "frequency"]
)
def test_every_family_learns(data, tmp_path, router):
    result = train(settings(data, tmp_path / "run", router, steps=60), console=quiet())
    log = metrics(tmp_path / "run")
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    validation = [row for row in log if "validation_nll" in row]
    assert validation[-1]["validation_bits_per_byte"] < validation[0]["validation_bits_per_byte"]
    assert result.finished and result.state.step == 60 and result.state.tokens == 60 * 4 * 32


@pytest.mark.parametrize("router", ["expert_choice", LOSS_FREE])
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(data, tmp_path, router):
    common = dict(save_every=5, accumulate=2)
    whole = train(settings(data, tmp_path / "whole", router, **common), console=quiet())
    part = settings(data, tmp_path / "part", router, **common)
    train(part, console=quiet())
    # as if killed after step 10
    remove_folder(RunFolder(tmp_path / "part").checkpoint(12))
    resumed = train(part, resume=True, console=quiet())
    ours, theirs = resumed.state.model.state_dict(), whole.state.model.state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    same = ("step", "loss", "validation_nll", "flops", "tokens")
    assert [[row.get(k) for k in same] for row in metrics(tmp_path / "part")] == [
        [row.get(k) for k in same] for row in metrics(tmp_path / "whole")
    ]


@pytest.mark.parametrize("router", ["expert_choice", LOSS_FREE])
def test_accumulation_equals_one_large_batch(data, tmp_path, router):
    one = train(settings(data, tmp_path / "a", router, steps=4, batch_size=8), console=quiet())
    two = train(
        settings(data, tmp_path / "b", router, steps=4, batch_size=4, accumulate=2), console=quiet()
    )
    # with the bias that balances
    ours, theirs = (
        two.state.model.state_dict(),
        one.state.model.state_dict(),
    )
    for name, expected in theirs.items():
        assert (ours[name] - expected).abs().max() < 1e-4, name
    assert one.state.flops == two.state.flops


def test_checkpoints_round_trip_bit_for_bit_and_hold_no_tied_copy(data, tmp_path):
    result = train(settings(data, tmp_path / "run", steps=3), console=quiet())
    loaded = checkpoint.load(tmp_path / "run")
    assert loaded.config == result.state.model.config
    state = result.state.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in loaded.model.state_dict().items())
    assert loaded.tokenizer.encode("square") == result.corpus.tokenizer.encode("square")
    assert json.loads((result.path / "config.json").read_text())["model_type"] == "mor"
    assert "head.weight" not in state


def test_a_failed_save_leaves_the_old_checkpoint_and_no_debris(data, tmp_path, monkeypatch):
    result = train(settings(data, tmp_path / "run", steps=3), console=quiet())
    before = (result.path / "model.safetensors").read_bytes()
    monkeypatch.setattr(
        checkpoint, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(result.path, result.state.model, result.corpus.tokenizer)
    assert (result.path / "model.safetensors").read_bytes() == before
    assert [p.name for p in result.path.parent.iterdir()] == [result.path.name]


def test_ctrl_c_saves_and_the_run_can_go_on(data, tmp_path, monkeypatch):
    config = settings(data, tmp_path / "run")
    import mor.training.loop as module

    real, steps = module.train_step, []

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(module, "train_step", interrupted)
    result = train(config, console=quiet())
    assert not result.finished and result.state.step == 5 and result.path.name == "step-00000005"
    resumed = train(config, resume=True, console=quiet())
    assert resumed.finished and resumed.state.step == 12


def test_sigterm_saves_as_ctrl_c_does(data, tmp_path, monkeypatch):
    import mor.training.loop as module

    real = module.train_step

    def terminated(*arguments):
        if arguments[1].step == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(module, "train_step", terminated)
    result = train(settings(data, tmp_path / "run"), console=quiet())
    assert not result.finished and result.state.step == 4
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_without_a_checkpoint_yet_resumes_at_its_beginning(data, tmp_path):
    config, console = settings(data, tmp_path / "run", steps=3), quiet()
    whole = train(config, console=quiet())
    remove_folder(whole.path)
    again = train(config, resume=True, console=console)
    assert "starting at its beginning" in console.file.getvalue()
    for a, b in zip(again.state.model.parameters(), whole.state.model.parameters(), strict=True):
        assert torch.equal(a, b)


def poisoned(monkeypatch, steps):
    """Batches of these steps give a loss that is not finite."""
    import mor.training.step as module

    real = module.compute_loss

    def loss(output):
        loss.calls += 1
        if loss.calls in steps:
            output.nll.data.fill_(math.nan)
        return real(output)

    loss.calls = 0
    monkeypatch.setattr(module, "compute_loss", loss)


def test_a_step_that_is_not_finite_is_skipped_and_counted(data, tmp_path, monkeypatch):
    poisoned(monkeypatch, {4, 5, 9})
    console = quiet()
    result = train(settings(data, tmp_path / "run", log_every=1), console=console)
    assert result.finished and result.state.step == 12 and result.state.skipped == 3
    assert all(p.isfinite().all() for p in result.state.model.parameters())
    assert console.file.getvalue().count("is skipped: its loss is not finite") == 3
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert rows[3]["loss"] is None and rows[5]["loss"] is not None
    assert checkpoint.load_progress(tmp_path / "run")["skipped"] == 3
    assert next(iter(result.state.optimizers[0].state.values()))["step"].item() == 9


def test_a_gradient_that_is_not_finite_is_skipped_although_its_loss_is(data, tmp_path, monkeypatch):
    import mor.training.step as module

    real, console = module.compute_loss, quiet()

    def loss(output):
        loss.calls += 1
        value = real(output)
        if loss.calls == 3:
            value.register_hook(lambda grad: grad * math.inf)
        return value

    loss.calls = 0
    monkeypatch.setattr(module, "compute_loss", loss)
    result = train(settings(data, tmp_path / "run", steps=4, log_every=1), console=console)
    assert (
        result.state.skipped == 1
        and "step 3 is skipped: its gradient is not finite" in console.file.getvalue()
    )
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert rows[2]["loss"] is not None and rows[2]["grad_norm"] is None
    assert all(p.isfinite().all() for p in result.state.model.parameters())


def test_steps_that_stay_not_finite_stop_the_run_with_the_last_good_checkpoint(
    data, tmp_path, monkeypatch
):
    poisoned(monkeypatch, range(6, 100))
    with pytest.raises(
        TrainingError,
        match=r"3 steps in a row .* step 8: its loss .*; lower optim.lr .*step-00000004",
    ):
        train(settings(data, tmp_path / "run", save_every=4, max_skipped=3), console=quiet())
    assert RunFolder(tmp_path / "run").newest_intact().name == "step-00000004"


def test_a_learning_rate_that_explodes_says_what_to_change(data, tmp_path):
    explosive = OptimConfig(lr=1e30, warmup=0.0)
    with pytest.raises(TrainingError, match=r"lower optim.lr .*No checkpoint was saved"):
        train(settings(data, tmp_path / "run", optim=explosive), console=quiet())


def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(data, tmp_path):
    config = settings(data, tmp_path / "run", save_every=4, keep=0)
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


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(data, tmp_path, monkeypatch):
    """A limit on the size of files refuses writes as a full disk does: real errors of every
    library."""
    config = settings(data, tmp_path / "run", save_every=4)
    folder, real = tmp_path / "run" / "checkpoints", sharded_state.save
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for largest in (2_000, 100_000):  # the optimizer's file is refused, or only the weights

        def full(path, *arguments, limit=largest, **others):
            if path.name == "step-00000008":
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            return real(path, *arguments, **others)

        monkeypatch.setattr(sharded_state, "save", full)
        try:
            with pytest.raises(
                TrainingError,
                match=r"could not write .*step-00000008.*last good checkpoint is .*step-00000004",
            ):
                train(config, resume=folder.exists(), console=quiet())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [p.name for p in folder.iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    assert train(config, resume=True, console=quiet()).finished


def test_what_a_killed_process_left_is_tidied(data, tmp_path):
    config = settings(data, tmp_path / "run")
    train(config, console=quiet())
    folder = tmp_path / "run" / "checkpoints"
    (folder / ".step-00000020.77.tmp").mkdir()
    (folder / ".step-00000004.removed.old").mkdir()
    # killed between two renames
    (folder / "step-00000012").rename(folder / ".step-00000012.77.old")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 99, "lo')
    assert train(config, resume=True, console=quiet()).state.step == 12
    assert [p.name for p in folder.iterdir()] == ["step-00000012"]
    assert metrics(tmp_path / "run")[-1]["step"] == 12


def test_a_branch_decays_from_the_stable_phase(data, tmp_path):
    stable = settings(data, tmp_path / "long", steps=20, save_every=5, keep=0)
    train(stable, console=quiet())
    start = RunFolder(tmp_path / "long").checkpoint(10)
    config = branch(start, cooldown_steps=4, out=str(tmp_path / "short"))
    result = train(dataclasses.replace(config, log_every=1), console=quiet())
    assert result.finished and result.state.step == 14 and result.state.tokens == 14 * 4 * 32
    rows = [row for row in metrics(tmp_path / "short") if "lr" in row]
    assert [row["step"] for row in rows] == [11, 12, 13, 14]
    assert [row["lr"] / stable.optim.lr for row in rows] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    direct = settings(
        data, tmp_path / "direct", steps=14, optim=OptimConfig(warmup=1 / 14, cooldown=4 / 14)
    )
    same = train(direct, console=quiet())  # warms up over the same single step
    for a, b in zip(result.state.model.parameters(), same.state.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"at step 20; a branch needs .* steps 1 to 16"):
        branch(tmp_path / "long", cooldown_steps=4, out=str(tmp_path / "no"))


def test_a_resumed_branch_starts_where_the_branch_did(data, tmp_path):
    train(settings(data, tmp_path / "long", steps=20, save_every=5, keep=0), console=quiet())
    start = RunFolder(tmp_path / "long").checkpoint(10)
    config = branch(start, cooldown_steps=4, out=str(tmp_path / "short"))
    first = train(config, console=quiet())
    remove_folder(first.path)
    again = train(config, resume=True, console=quiet())
    for a, b in zip(first.state.model.parameters(), again.state.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_router_health_by_hand():
    model = tiny("expert_choice", num_recursions=3)
    routing = model(random_tokens(2, 12), selection="topk").routing
    found = model.router.health([routing])
    assert found["mean_depth"] == pytest.approx(2.0) and found[
        "share_per_recursion"
    ] == pytest.approx([1, 2 / 3, 1 / 3])
    assert found["depth_entropy"] == pytest.approx(1.0), "a third of the tokens at each depth"
    last = routing.selected_BT(2)
    assert found["dead_positions"] == pytest.approx(
        sum(not (last[0, t] or last[1, t]) for t in range(12)) / 12
    )
    same = [
        bool(routing.selected_BT(r)[b, t]) == bool(routing.logit_BT(r)[b, t] > 0)
        for r in (1, 2)
        for b in range(2)
        for t in range(12)
        if not routing.logit_BT(r)[b, t].isnan()
    ]
    assert found["agreement"] == pytest.approx(sum(same) / len(same))
    chosen = tiny("token_choice", num_recursions=3)
    routing = chosen(random_tokens(2, 12), selection="topk").routing
    load = torch.bincount(routing.depth - 1, minlength=3) / 24
    assert chosen.router.health([routing])["max_violation"] == pytest.approx(
        3 * load.max().item() - 1
    )
    plain = tiny("fixed", num_recursions=3)
    assert plain.router.health([plain(random_tokens(2, 5)).routing]).keys() == {
        "mean_depth",
        "share_per_recursion",
    }


def test_a_collapsed_router_is_reported_in_plain_words(data, tmp_path, monkeypatch):
    console = quiet()
    config = settings(data, tmp_path / "run", steps=2, eval_every=1)
    import mor.training.loop as module

    real = module.Transformer.init_weights

    def collapsed(model, seed):
        real(model, seed).router.threshold_R.fill_(1.0)
        return model

    monkeypatch.setattr(module.Transformer, "init_weights", collapsed)
    train(config, console=console)
    printed = console.file.getvalue()
    assert printed.count("no validation token takes recursion 2: the router collapsed") == 1, (
        "once, not at every step"
    )
    assert metrics(tmp_path / "run")[-1]["validation_share_per_recursion"] == [1.0, 0.0]
    assert collapse_message([1.0, 0.01, 0.001]) is None


def test_two_processes_do_not_train_in_one_directory(data, tmp_path):
    config = settings(data, tmp_path / "run", steps=1)
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        for resume in (False, True):
            with pytest.raises(ValueError, match="another process is training in"):
                train(config, console=quiet(), resume=resume)
    train(config, console=quiet())
    FileLock(tmp_path / "run" / ".lock", blocking=False).acquire()


def test_an_existing_run_is_not_overwritten(data, tmp_path):
    config = settings(data, tmp_path / "run", steps=1)
    train(config, console=quiet())
    with pytest.raises(ValueError, match="already holds a run"):
        train(config, console=quiet())


def test_a_run_keeps_its_settings(data, tmp_path):
    config = settings(data, tmp_path / "run", steps=1)
    result = train(config, console=quiet())
    kept = load_config(RunFolder(tmp_path / "run").settings)
    assert (
        kept.model == result.state.model.config and kept.optim == config.optim and kept.data == data
    )


def test_a_flop_budget_is_spent_to_within_a_step(data, tmp_path):
    config = settings(data, tmp_path / "run", flops=2e9, capacity_warmup_steps=4, eval_every=100)
    result = train(config, console=quiet())
    # the vocabulary comes from the tokenizer, so the spent budget is what counts, not the planned
    # steps
    assert abs(result.state.flops / 2e9 - 1) < 0.1
    assert result.state.step == total_steps(load_config(RunFolder(tmp_path / "run").settings))


def test_capacity_warm_up_falls_from_one(data, tmp_path):
    config = settings(data, tmp_path, capacity_warmup_steps=10)
    assert capacities_at(config, 0) == (1.0, 1.0)
    assert capacities_at(config, 5) == pytest.approx((1.0, 0.75))
    assert capacities_at(config, 10) == (1.0, 0.5)


def test_schedules():
    trapezoid = OptimConfig(lr=1.0, warmup=0.1, cooldown=0.2)
    rates = [learning_rate(trapezoid, s, 100) for s in range(100)]
    assert rates[:2] == pytest.approx([0.1, 0.2]) and rates[9:81] == pytest.approx([1.0] * 72)
    assert rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)
    cosine = OptimConfig(lr=1.0, warmup=0.1, schedule="cosine", final_lr=0.1)
    rates = [learning_rate(cosine, s, 100) for s in range(100)]
    assert (
        max(rates) == pytest.approx(1.0) and rates[55] == pytest.approx(0.55) and rates[99] < 0.11
    )
    with pytest.raises(ValueError, match="add up to at most 1"):
        OptimConfig(warmup=0.5, cooldown=0.6)


def test_evaluation_is_causal_unless_asked_and_says_so(data, tmp_path):
    result = train(settings(data, tmp_path / "run", steps=20), console=quiet())
    model, validation = result.state.model, result.corpus.validation
    causal = evaluate(model, validation, seq_len=32)
    leaking = evaluate(model, validation, seq_len=32, selection="topk")
    assert causal.causal and not leaking.causal and causal.nll != leaking.nll
    per_byte = causal.nll / math.log(2) * len(validation) / validation.num_bytes
    assert causal.bits_per_byte == pytest.approx(per_byte)
    one_by_one = evaluate(model, validation, seq_len=32, batch_size=1)
    assert one_by_one.nll == pytest.approx(causal.nll, rel=1e-5)
    assert evaluate(model, validation, seq_len=32, max_depth=1).mean_depth == 1
    with pytest.raises(ValueError, match="less than one window"):
        evaluate(model, validation, seq_len=10**6)


def test_a_damaged_or_foreign_weight_file_is_named(data, tmp_path):
    result = train(settings(data, tmp_path / "run", steps=1), console=quiet())
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
