"""Going on from a checkpoint: the same run, a longer one, a branch, and never another run."""

import dataclasses

import pytest
import torch

from mor.files import remove_folder
from mor.run_folder import RunFolder
from mor.training.loop import train
from mor.training.optim import OptimConfig
from mor.training.resume import branch
from tests.training.small_run import metrics, quiet, settings


def test_a_branch_decays_from_the_stable_phase(squares, tmp_path):
    stable = settings(squares, tmp_path / "long", steps=20, save_every=5, keep=0)
    train(stable, console=quiet())
    start = RunFolder(tmp_path / "long").checkpoint(10)
    config = branch(start, cooldown_steps=4, out=str(tmp_path / "short"))
    result = train(dataclasses.replace(config, log_every=1), console=quiet())
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
