"""Going on from a checkpoint: the same run, a longer one, a branch, and never another run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mor.files import remove_folder, write_checksums
from mor.run_folder import RunFolder
from mor.training.config import load_config, settings_of
from mor.training.loop import train
from mor.training.optim import OptimConfig
from mor.training.resume import Saved, branch, lengthened, settings_to_resume
from tests.training.small_run import metrics, quiet, settings

STEADY = OptimConfig(cooldown=0.25)
NEW = ("settings", "data", "ranks", "schedules")


def test_a_branch_decays_from_the_stable_phase(squares, tmp_path):
    stable = settings(squares, tmp_path / "long", steps=20, save_every=5, keep=0)
    train(stable, console=quiet())
    start = RunFolder(tmp_path / "long").checkpoint(10)
    config = branch(start, cooldown_steps=4, out=str(tmp_path / "short"))
    result = train(replace(config, log_every=1), console=quiet())
    assert result.finished and result.state.step == 14 and result.state.tokens == 14 * 4 * 32
    rows = [row for row in metrics(tmp_path / "short") if "lr" in row]
    assert [row["step"] for row in rows] == [11, 12, 13, 14]
    assert [row["lr"] / stable.optim.lr for row in rows] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    direct = settings(
        squares, tmp_path / "direct", steps=14, optim=OptimConfig(warmup=1 / 14, cooldown=4 / 14)
    )
    same = train(direct, console=quiet())  # warms up over the same single step
    for a, b in zip(result.state.model.parameters(), same.state.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"at step 20; a branch needs .* steps 1 to 16"):
        branch(tmp_path / "long", cooldown_steps=4, out=str(tmp_path / "no"))


def test_a_resumed_branch_starts_where_the_branch_did(squares, tmp_path):
    train(settings(squares, tmp_path / "long", steps=20, save_every=5, keep=0), console=quiet())
    start = RunFolder(tmp_path / "long").checkpoint(10)
    config = branch(start, cooldown_steps=4, out=str(tmp_path / "short"))
    first = train(config, console=quiet())
    remove_folder(first.path)
    again = train(config, resume=True, console=quiet())
    for a, b in zip(first.state.model.parameters(), again.state.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def halfway(squares, tmp_path_factory):
    """A run of 12 steps that stopped after 6: its settings, and its folder to copy."""
    folder = tmp_path_factory.mktemp("resume") / "run"
    config = settings(squares, folder, save_every=6, optim=STEADY)
    remove_folder(train(config, console=quiet()).path)
    return config


def copied(config, tmp_path):
    """The same run in a folder of its own."""
    shutil.copytree(config.out, tmp_path / "run", symlinks=True)
    return replace(config, out=str(tmp_path / "run"))


def equal_weights(a, b):
    pairs = zip(a.state.model.parameters(), b.state.model.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: replace(c, seed=1), "seed was 0, is 1"),
        (lambda c: replace(c, seq_len=16), "seq_len was 32, is 16"),
        (lambda c: replace(c, batch_size=8), r"sequences of a step were 4 × 1 × 1 = 4, are 8 × 1 "),
        (lambda c: replace(c, optim=replace(c.optim, lr=1.0)), "optim.lr was 0.003, is 1.0"),
        (lambda c: replace(c, optim=replace(c.optim, warmup=0.5)), "optim.warmup was 0.05, is 0.5"),
        (lambda c: replace(c, model=c.model.replace(dim=32)), r"model.dim was 64, is 32"),
        (
            lambda c: replace(c, data=replace(c.data, document_mask=True), seed=2),
            r"data.document_mask was False, is True; seed was 0, is 2",
        ),
        (
            lambda c: replace(c, data=replace(c.data, validation_share=0.3)),
            r"data.validation_share was 0.05, is 0.3; data: train.documents was 11\d, is \d+",
        ),
        (
            lambda c: replace(c, data=replace(c.data, tokenizer="bytes")),
            "data.tokenizer was bpe, is bytes",
        ),
    ],
)
def test_what_would_make_it_another_run_is_named_and_nothing_is_written(
    halfway, tmp_path, change, words
):
    config = copied(halfway, tmp_path)
    with pytest.raises(ValueError, match=rf"not the run that .*00000006 was saved from: {words}"):
        train(change(config), resume=True, console=quiet())
    config = load_config(RunFolder(tmp_path / "run").settings)
    assert config.seed == 0 and config.optim == STEADY
    assert [row["step"] for row in metrics(tmp_path / "run")][-1] == 12


def test_a_replaced_corpus_is_another_run_and_a_moved_one_is_not(halfway, tmp_path):
    config, text = copied(halfway, tmp_path), Path(halfway.data.path).read_text()
    moved = replace(config, data=replace(config.data, path=str(tmp_path / "a.jsonl")))
    for content, words in (
        (text.replace("square", "SQUARE"), "data: train.tokens was"),
        (text + text, "data: train.documents was"),
    ):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(ValueError, match=words):
            train(moved, resume=True, console=quiet())
    (tmp_path / "a.jsonl").write_text(text)
    assert train(moved, resume=True, console=quiet()).finished


def test_what_changes_nothing_may_change_and_what_moves_numbers_is_said(halfway, tmp_path):
    config, console = copied(halfway, tmp_path), quiet()
    whole = train(replace(halfway, out=str(tmp_path / "whole")), console=quiet())
    other = replace(config, log_every=1, keep=5, eval_every=12, save_every=4, recompute=True)
    resumed = train(other, resume=True, console=console)
    assert equal_weights(resumed, whole)
    assert "recompute was False, is True: numbers may differ" in console.file.getvalue()
    steps = [path.name[-2:] for path in RunFolder(tmp_path / "run").checkpoints()]
    assert steps == ["06", "08", "12"]


def test_a_step_may_be_shared_out_otherwise(halfway, tmp_path):
    config = replace(copied(halfway, tmp_path), batch_size=2, accumulate=2)
    whole = train(replace(halfway, out=str(tmp_path / "whole")), console=quiet())
    resumed = train(config, resume=True, console=quiet())
    for a, b in zip(resumed.state.model.parameters(), whole.state.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


# Other lengths


def rates(out):
    return {row["step"]: row["lr"] for row in metrics(out) if "lr" in row}


def test_a_run_lengthened_before_its_decay_equals_one_planned_so_bit_for_bit(halfway, tmp_path):
    config, console = replace(copied(halfway, tmp_path), log_every=1), quiet()
    longer = train(replace(config, steps=20), resume=True, console=console)
    assert longer.finished and longer.state.step == 20
    assert "ends at step 20, not 12 as it was planned\n" in console.file.getvalue()
    planned = replace(STEADY, warmup=0.05 * 12 / 20)
    whole = replace(halfway, steps=20, optim=planned, out=str(tmp_path / "whole"), log_every=1)
    assert equal_weights(longer, train(whole, console=quiet()))
    found, expected = rates(tmp_path / "run"), rates(tmp_path / "whole")
    assert found[12] == halfway.optim.lr and found == {s: expected[s] for s in found}
    again = quiet()
    assert train(replace(config, steps=20), resume=True, console=again).finished
    assert "has taken all of its 20 steps" in again.file.getvalue()


def test_a_finished_run_that_is_lengthened_returns_to_its_peak_and_falls_again(halfway, tmp_path):
    config = replace(copied(halfway, tmp_path), log_every=1)
    train(config, resume=True, console=quiet())
    console = quiet()
    longer = replace(config, steps=24)
    train(longer, resume=True, console=console)
    peak, found = config.optim.lr, rates(tmp_path / "run")
    assert [found[s] / peak for s in (9, 10, 11, 12)] == pytest.approx([1, 1, 2 / 3, 1 / 3])
    assert [found[s] / peak for s in (13, 18, 19)] == [1.0] * 3
    assert [found[s] / peak for s in (20, 22, 24)] == pytest.approx([5 / 6, 3 / 6, 1 / 6])
    said = console.file.getvalue()
    assert "fallen since step 9: it returns to its peak and falls again in the last 6" in said
    assert "--branch-from CHECKPOINT --steps 24" in said


def test_a_lengthened_run_that_is_killed_at_once_stays_lengthened(halfway, tmp_path, monkeypatch):
    import mor.training.loop as module

    config = copied(halfway, tmp_path)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, steps=20), resume=True, console=quiet())
    monkeypatch.undo()
    kept = load_config(RunFolder(tmp_path / "run").settings)
    assert kept.steps == 20 and kept.optim == STEADY, "what was chosen, whatever is in force"
    saved = Saved.of(RunFolder(tmp_path / "run").checkpoint(6))
    assert saved.schedules == [[0.05, 0.25], [pytest.approx(0.03), 0.25]]
    assert train(replace(config, steps=16), resume=True, console=quiet()).state.step == 16


def test_lengths_that_cannot_be(halfway, tmp_path):
    config = copied(halfway, tmp_path)
    with pytest.raises(ValueError, match=r"has taken 6 steps already, more than the 4 of the"):
        train(replace(config, steps=4), resume=True, console=quiet())
    cosine = OptimConfig(schedule="cosine", warmup=0.5)
    with pytest.raises(ValueError, match=r"cosine schedule .* the 100 steps .* new run of 200"):
        lengthened(cosine, 51, 100, 200)
    assert lengthened(cosine, 50, 100, 200).warmup == 0.25, "it has not begun to fall"
    with pytest.raises(ValueError, match=r"warm-up alone takes 50 steps, more than the 40"):
        lengthened(replace(cosine, cooldown=0.0), 30, 100, 40)
    short = lengthened(OptimConfig(warmup=0.1, cooldown=0.2), 50, 100, 55)
    assert short.warmup * 55 == pytest.approx(10) and short.cooldown * 55 == pytest.approx(5)


def test_a_lengthened_run_starts_anew_with_the_schedule_that_was_chosen(halfway, tmp_path):
    """From its file, or at its beginning when its checkpoints are gone."""
    config = replace(copied(halfway, tmp_path), steps=20, log_every=1)
    train(config, resume=True, console=quiet())
    run = RunFolder(tmp_path / "run")
    kept = load_config(run.settings)
    assert (kept.steps, kept.optim) == (20, STEADY)
    for path in run.checkpoints():
        remove_folder(path)
    train(replace(kept, steps=20), resume=True, console=quiet())
    whole = replace(halfway, steps=20, out=str(tmp_path / "whole"), log_every=1)
    train(whole, console=quiet())
    assert rates(run.path) == rates(tmp_path / "whole")


def test_a_cool_down_that_a_short_end_cut_is_whole_again_in_a_longer_run(halfway, tmp_path):
    config = copied(halfway, tmp_path)
    train(replace(config, steps=7), resume=True, console=quiet())
    saved = Saved.of(RunFolder(tmp_path / "run").checkpoint(7))
    assert saved.in_force.optim.cooldown == pytest.approx(1 / 7)
    train(replace(config, steps=16), resume=True, console=quiet())
    saved = Saved.of(RunFolder(tmp_path / "run").checkpoint(16))
    assert saved.in_force.optim.cooldown == 0.25 and saved.settings.optim == STEADY


def test_settings_come_from_the_checkpoint_where_the_file_of_the_run_is_missing(halfway, tmp_path):
    config = copied(halfway, tmp_path)
    run = RunFolder(tmp_path / "run")
    run.settings.unlink()
    found = settings_to_resume(config.out)
    assert found == load_config(RunFolder(Path(halfway.out)).settings)
    assert settings_of(run.path) == found
    run.checkpoint(6).rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"run holds no run to resume \(no train.json, no check"):
        settings_to_resume(config.out)


def test_a_branch_to_more_steps_is_what_a_run_planned_so_would_be(halfway, tmp_path):
    start = RunFolder(Path(halfway.out)).checkpoint(6)
    config = branch(start, steps=20, out=str(tmp_path / "branch"))
    planned = replace(STEADY, warmup=0.05 * 12 / 20)
    assert config.optim == planned and config.steps == 20
    whole = replace(halfway, steps=20, optim=planned, out=str(tmp_path / "whole"))
    assert equal_weights(train(config, console=quiet()), train(whole, console=quiet()))
    lower = branch(start, steps=20, lr=1e-3, out=str(tmp_path / "lower"))
    assert lower.optim.lr == 1e-3 and train(lower, console=quiet()).finished
    for steps in (5, 6):
        with pytest.raises(ValueError, match=f"taken 6 steps already; a branch of {steps} steps"):
            branch(start, steps=steps, out="x")
    with pytest.raises(ValueError, match="either cooldown_steps or steps"):
        branch(start, steps=20, cooldown_steps=3, out="x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(seed=1), "seed was 0, is 1"),
        (dict(steps=6), "6 steps already; a branch of 6 steps in all has nothing left"),
    ],
)
def test_a_branch_with_other_settings_than_its_trunk_is_refused(halfway, tmp_path, change, words):
    start = RunFolder(Path(halfway.out)).checkpoint(6)
    config = branch(start, cooldown_steps=4, out=str(tmp_path / "branch"))
    with pytest.raises(ValueError, match=words):
        train(replace(config, **change), console=quiet())
    assert not (tmp_path / "branch").exists()


def test_a_checkpoint_of_the_first_version_goes_on_with_a_note(halfway, tmp_path):
    config, console = copied(halfway, tmp_path), quiet()
    folder = RunFolder(tmp_path / "run").checkpoint(6)
    file = folder / "training_state" / "progress.json"
    old = {k: v for k, v in json.loads(file.read_text()).items() if k not in NEW}
    file.write_text(json.dumps(old))
    (folder / "checksums.json").unlink()
    write_checksums(folder)
    with pytest.raises(ValueError, match=r"model.dim was 64, is 32"):
        train(replace(config, model=config.model.replace(dim=32)), resume=True, console=quiet())
    assert train(config, resume=True, console=console).finished
    assert "written by mor 0.1.0, which kept neither settings" in console.file.getvalue()
