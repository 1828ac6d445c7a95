"""The state of the optimizer on a full disk."""

import resource

import pytest

from mor.training import sharded_state
from mor.training.loop import TrainingError, train
from tests.training.small_run import quiet, settings


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(squares, tmp_path, monkeypatch):
    """A limit on the size of files refuses writes as a full disk does: real errors of every
    library."""
    config = settings(squares, tmp_path / "run", save_every=4)
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
