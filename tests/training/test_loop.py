"""Training end to end on a small corpus: learns, resumes bit for bit, says what is wrong."""

import signal

import pytest
import torch
from filelock import FileLock

from mor.files import remove_folder
from mor.run_folder import RunFolder
from mor.training.loop import TrainingError, collapse_message, train
from mor.training.optim import OptimConfig
from tests.training.small_run import LOSS_FREE, metrics, poisoned, quiet, settings


@pytest.mark.parametrize(
    "router", ["fixed", "expert_choice", "token_choice", "random", "position", "frequency"]
)
def test_every_family_learns(squares, tmp_path, router):
    result = train(settings(squares, tmp_path / "run", router, steps=60), console=quiet())
    log = metrics(tmp_path / "run")
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    validation = [row for row in log if "validation_nll" in row]
    assert validation[-1]["validation_bits_per_byte"] < validation[0]["validation_bits_per_byte"]
    assert result.finished and result.state.step == 60 and result.state.tokens == 60 * 4 * 32


@pytest.mark.parametrize("router", ["expert_choice", LOSS_FREE])
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(squares, tmp_path, router):
    common = dict(save_every=5, accumulate=2)
    whole = train(settings(squares, tmp_path / "whole", router, **common), console=quiet())
    part = settings(squares, tmp_path / "part", router, **common)
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


def test_ctrl_c_saves_and_the_run_can_go_on(squares, tmp_path, monkeypatch):
    config = settings(squares, tmp_path / "run")
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


def test_sigterm_saves_as_ctrl_c_does(squares, tmp_path, monkeypatch):
    import mor.training.loop as module

    real = module.train_step

    def terminated(*arguments):
        if arguments[1].step == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(module, "train_step", terminated)
    result = train(settings(squares, tmp_path / "run"), console=quiet())
    assert not result.finished and result.state.step == 4
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_without_a_checkpoint_yet_resumes_at_its_beginning(squares, tmp_path):
    config, console = settings(squares, tmp_path / "run", steps=3), quiet()
    whole = train(config, console=quiet())
    remove_folder(whole.path)
    again = train(config, resume=True, console=console)
    assert "starting at its beginning" in console.file.getvalue()
    for a, b in zip(again.state.model.parameters(), whole.state.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_steps_that_stay_not_finite_stop_the_run_with_the_last_good_checkpoint(
    squares, tmp_path, monkeypatch
):
    poisoned(monkeypatch, range(6, 100))
    with pytest.raises(
        TrainingError,
        match=r"3 steps in a row .* step 8: its loss .*; lower optim.lr .*step-00000004",
    ):
        train(settings(squares, tmp_path / "run", save_every=4, max_skipped=3), console=quiet())
    assert RunFolder(tmp_path / "run").newest_intact().name == "step-00000004"


def test_a_learning_rate_that_explodes_says_what_to_change(squares, tmp_path):
    explosive = OptimConfig(lr=1e30, warmup=0.0)
    with pytest.raises(TrainingError, match=r"lower optim.lr .*No checkpoint was saved"):
        train(settings(squares, tmp_path / "run", optim=explosive), console=quiet())


def test_what_a_killed_process_left_is_tidied(squares, tmp_path):
    config = settings(squares, tmp_path / "run")
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


def test_a_collapsed_router_is_reported_in_plain_words(squares, tmp_path, monkeypatch):
    console = quiet()
    config = settings(squares, tmp_path / "run", steps=2, eval_every=1)
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


def test_two_processes_do_not_train_in_one_directory(squares, tmp_path):
    config = settings(squares, tmp_path / "run", steps=1)
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        for resume in (False, True):
            with pytest.raises(ValueError, match="another process is training in"):
                train(config, console=quiet(), resume=resume)
    train(config, console=quiet())
    FileLock(tmp_path / "run" / ".lock", blocking=False).acquire()


def test_an_existing_run_is_not_overwritten(squares, tmp_path):
    config = settings(squares, tmp_path / "run", steps=1)
    train(config, console=quiet())
    with pytest.raises(ValueError, match="already holds a run"):
        train(config, console=quiet())
